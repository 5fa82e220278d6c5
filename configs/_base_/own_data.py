"""New classes on top of a trained mmseg model, from two folders; docs/own_data.md leads through it."""
_base_ = ['./datasets/folders.py', './schedules/adamw_poly.py', './default_hooks.py', './default_runtime.py']

# The mmseg config that the checkpoint given by --base was trained with.
model_config = None
# Over the trained model's: the segmentor of the stages and a method's parts. No weights are fetched.
model = dict(
    type='IncrementalEncoderDecoder',
    pseudo_labeler='$pseudo_labeler',
    distillation='$distillation',
    classifier_init='$classifier_init',
    pretrained=None,
    data_preprocessor=dict(size='$crop_size', size_divisor=None),
    backbone=dict(init_cfg=None),
    decode_head=dict(loss_decode='$segmentation_loss'))

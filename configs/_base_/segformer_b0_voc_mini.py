"""SegFormer-B0 on voc_mini: 1313 VOC photographs with a long side of 384 px, all 20 classes, on a CPU."""
_base_ = ['./models/segformer.py', './datasets/voc.py', './schedules/adamw_poly.py', './default_hooks.py', './default_runtime.py']

pretrained = 'checkpoints/mit_b0.pth'
norm_cfg = dict(_delete_=True, type='BN')
model = dict(
    backbone=dict(embed_dims=32, num_layers=[2, 2, 2, 2]),
    decode_head=dict(in_channels=[32, 64, 160, 256]))

dataset = 'voc_mini'
data_root = 'data/voc_mini'
train_list = 'ImageSets/Segmentation/train.txt'
train_masks = 'SegmentationClass'
batch_size = 12
num_workers = 1

# Chosen on a split of train.txt, see docs/results.md.
crop_size = 160
epochs = 6
lr = 4e-4
later_stages = dict(lr=1e-4)
head_lr_mult = 10.0

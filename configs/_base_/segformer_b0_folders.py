"""SegFormer-B0 on a folder of images and one of masks, all classes to be learned; docs/folders.md leads through it."""
_base_ = ['./models/segformer.py', './datasets/folders.py', './schedules/adamw_poly.py', './default_runtime.py']

pretrained = 'checkpoints/mit_b0.pth'
norm_cfg = dict(_delete_=True, type='BN')
model = dict(
    backbone=dict(embed_dims=32, num_layers=[2, 2, 2, 2]),
    decode_head=dict(in_channels=[32, 64, 160, 256]))

# As on voc_mini; the protocol is the data's to say.
protocol = None
epochs = 20
lr = 4e-4
later_stages = dict(lr=1e-4)
head_lr_mult = 10.0

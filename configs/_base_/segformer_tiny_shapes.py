"""A SegFormer of one layer a block on the embedded data, trained from scratch within minutes on a CPU."""
_base_ = ['./models/segformer.py', './datasets/shapes.py', './schedules/adamw_poly.py', './default_hooks.py', './default_runtime.py']

pretrained = None
norm_cfg = dict(_delete_=True, type='BN')
model = dict(
    backbone=dict(embed_dims=16, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], drop_path_rate=0.0),
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=64))

epochs = 20
lr = 2e-3
head_lr_mult = 1.0
later_stages = dict(lr=1e-3)

"""Twins-PCPVT-S with UPerNet on VOC; the attention of the last layer of each stage.

AdamW as mmseg trains it on ADE20K; nobody has published a schedule for stages, a tenth in the later ones is the paper's.
"""
_base_ = ['./models/upernet.py', './datasets/voc.py', './schedules/adamw_poly.py', './default_hooks.py', './default_runtime.py']

pretrained = 'https://mmassets.onedl.ai/mmsegmentation/v0.5/pretrain/twins/pcpvt_small_20220308-e638c41c.pth'
model = dict(
    backbone=dict(
        type='AttentionPCPVT',
        embed_dims=[64, 128, 320, 512],
        num_heads=[1, 2, 5, 8],
        patch_sizes=[4, 2, 2, 2],
        strides=[4, 2, 2, 2],
        mlp_ratios=[8, 8, 4, 4],
        out_indices=(0, 1, 2, 3),
        qkv_bias=True,
        norm_cfg=dict(type='LN'),
        depths=[3, 4, 6, 3],
        sr_ratios=[8, 4, 2, 1],
        norm_after_stage=False,
        drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320))
epochs = 30
lr = 6e-5
later_stages = dict(lr=6e-6)
head_lr_mult = 1.0

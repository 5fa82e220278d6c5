"""Swin-T with UPerNet on VOC; the attention of the last layer of each stage, within its windows.

AdamW as mmseg trains it on ADE20K; nobody has published a schedule for stages, a tenth in the later ones is the paper's.
"""
_base_ = ['./models/upernet.py', './datasets/voc.py', './schedules/adamw_poly.py', './default_hooks.py', './default_runtime.py']

pretrained = 'https://mmassets.onedl.ai/mmsegmentation/v0.5/pretrain/swin/swin_tiny_patch4_window7_224_20220317-1cdeb081.pth'
model = dict(
    backbone=dict(
        type='AttentionSwinTransformer',
        pretrain_img_size=224,
        embed_dims=96,
        patch_size=4,
        window_size=7,
        mlp_ratio=4,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        strides=(4, 2, 2, 2),
        out_indices=(0, 1, 2, 3),
        qkv_bias=True,
        patch_norm=True,
        drop_path_rate=0.3,
        use_abs_pos_embed=False,
        act_cfg=dict(type='GELU'),
        norm_cfg=dict(type='LN')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(relative_position_bias_table=dict(decay_mult=0.0))))
epochs = 30
lr = 6e-5
later_stages = dict(lr=6e-6)
head_lr_mult = 1.0

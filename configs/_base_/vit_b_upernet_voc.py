"""ViT-B/16 with MultiLevelNeck and UPerNet on VOC; the attention of layers 3, 6, 9 and 12.

mmsegmentation's tools/model_converters/vit2mmseg.py makes the weights out of timm's. AdamW as mmseg trains it on
ADE20K; nobody has published a schedule for stages, a tenth in the later ones is the paper's.
"""
_base_ = ['./models/upernet.py', './datasets/voc.py', './schedules/adamw_poly.py', './default_hooks.py', './default_runtime.py']

pretrained = 'checkpoints/vit_b16.pth'
model = dict(
    backbone=dict(
        type='AttentionVisionTransformer',
        img_size=(512, 512),  # of the position embedding; other images interpolate it
        patch_size=16,
        embed_dims=768,
        num_layers=12,
        num_heads=12,
        mlp_ratio=4,
        out_indices=(2, 5, 8, 11),
        qkv_bias=True,
        drop_path_rate=0.1,
        with_cls_token=True,
        norm_cfg=dict(type='LN', eps=1e-6),
        act_cfg=dict(type='GELU'),
        interpolate_mode='bicubic'),
    neck=dict(
        type='MultiLevelNeck', in_channels=[768, 768, 768, 768], out_channels=768, scales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768, in_index=3))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0))))
epochs = 30
lr = 6e-5
later_stages = dict(lr=6e-6)
head_lr_mult = 1.0

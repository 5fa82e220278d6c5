"""SegFormer, of B2's sizes; the recipes beside this folder set others. tools/convert_mit.py makes the weights."""
pretrained = 'checkpoints/mit_b2.pth'
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='IncrementalEncoderDecoder',
    pseudo_labeler='$pseudo_labeler',
    distillation='$distillation',
    classifier_init='$classifier_init',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size='$crop_size',
        pad_val=0,
        seg_pad_val=255),
    backbone=dict(
        type='AttentionMixVisionTransformer',
        embed_dims=64,
        num_layers=[3, 4, 6, 3],
        num_heads=[1, 2, 5, 8],
        qkv_bias=True,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='$pretrained')),
    decode_head=dict(
        type='LeanSegformerHead',
        in_channels=[64, 128, 320, 512],
        in_index=[0, 1, 2, 3],
        channels=256,
        dropout_ratio=0.1,
        num_classes='$num_channels',
        norm_cfg='$norm_cfg',
        align_corners=False,
        loss_decode='$segmentation_loss'),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))

"""FCN on a dilated ResNet-50 (mmseg's d8)."""
pretrained = 'open-mmlab://resnet50_v1c'  # or a file
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
        type='ResNetV1c',
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 2, 4),
        strides=(1, 2, 1, 1),
        norm_cfg='$norm_cfg',
        norm_eval=False,
        style='pytorch',
        contract_dilation=True,
        init_cfg=dict(type='Pretrained', checkpoint='$pretrained')),
    decode_head=dict(
        type='FCNHead',
        in_channels=2048,
        in_index=3,
        channels=512,
        num_convs=2,
        concat_input=True,
        dropout_ratio=0.1,
        num_classes='$num_channels',
        norm_cfg='$norm_cfg',
        align_corners=False,
        loss_decode='$segmentation_loss'),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=1024,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes='$num_channels',
        norm_cfg='$norm_cfg',
        align_corners=False,
        loss_decode='$auxiliary_loss'),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
# On the labels that the decode head sees, at mmseg's weight. Where a method's segmentation_loss is no plain
# cross-entropy, these heads get it too, at this weight.
auxiliary_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)

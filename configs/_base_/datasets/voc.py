"""Pascal VOC 2012 with SBD's masks (train_aug, 10,582 images): crop, flip and scale as mmseg does."""
dataset = 'voc'
data_root = 'data/VOCdevkit/VOC2012'
train_list = 'ImageSets/Segmentation/train_aug.txt'
val_list = 'ImageSets/Segmentation/val.txt'
train_masks = 'SegmentationClassAug'
val_masks = 'SegmentationClass'
crop_size = 512
batch_size = 24
num_workers = 4
persistent_workers = True


train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    # The data set puts the stage's relabelling here.
    dict(type='RandomResize', scale='$crop_scale', ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size='$crop_size', cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')
]
# Whole images at their own size.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
# As in the published figures: short side to the crop, then its centre. Chosen by
# --cfg-options 'eval_pipeline=$centre_crop_pipeline'
centre_crop_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale='$crop_scale', keep_ratio=True),
    dict(type='CenterCrop', crop_size='$crop_wh'),
    dict(type='EvaluateAsIs'),
    dict(type='PackSegInputs')
]
eval_pipeline = '$test_pipeline'
train_dataset = dict(
    type='PascalVOCDataset',
    data_root='$data_root',
    ann_file='$train_list',
    data_prefix=dict(img_path='JPEGImages', seg_map_path='$train_masks'),
    pipeline='$train_pipeline')
eval_dataset = dict(
    type='PascalVOCDataset',
    data_root='$data_root',
    ann_file='$val_list',
    data_prefix=dict(img_path='JPEGImages', seg_map_path='$val_masks'),
    pipeline='$eval_pipeline')

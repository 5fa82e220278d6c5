"""Cityscapes (2,975 training images, 500 for validation) with the 19 classes of its benchmark.

Its masks know no background: 0 is road, 18 is bicycle, and 255 is ignored. Here background is what is not seen yet
(docs/own_data.md, "Data without background").
"""
dataset = 'cityscapes'
data_root = 'data/cityscapes'
no_background = True
# As tools/dataset_converters/cityscapes.py of mmseg writes them: *_gtFine_labelTrainIds.png
train_images = 'leftImg8bit/train'
train_masks = 'gtFine/train'
val_images = 'leftImg8bit/val'
val_masks = 'gtFine/val'
crop_size = (512, 1024)
batch_size = 8
num_workers = 4
persistent_workers = True

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    # The data set puts the stage's relabelling here.
    dict(type='RandomResize', scale=(2048, 1024), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size='$crop_size', cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')
]
# Whole images at their own size, 1024 x 2048.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
eval_pipeline = '$test_pipeline'
train_dataset = dict(
    type='CityscapesDataset',
    data_root='$data_root',
    data_prefix=dict(img_path='$train_images', seg_map_path='$train_masks'),
    pipeline='$train_pipeline')
eval_dataset = dict(
    type='CityscapesDataset',
    data_root='$data_root',
    data_prefix=dict(img_path='$val_images', seg_map_path='$val_masks'),
    pipeline='$eval_pipeline')

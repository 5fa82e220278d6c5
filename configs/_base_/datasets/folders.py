"""Two folders, images and masks; class_names are background and the classes in the order of the protocol."""
dataset = 'own'
data_root = 'data/own'
train_images = 'images/train'
train_masks = 'masks/train'
val_images = 'images/val'
val_masks = 'masks/val'
class_names = None
mask_values = dict()
ignore_values = ()
crop_size = 512
batch_size = 8
num_workers = 2
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
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
eval_pipeline = '$test_pipeline'
train_dataset = dict(
    type='FolderDataset',
    classes='$class_names',
    mask_values='$mask_values',
    ignore_values='$ignore_values',
    data_root='$data_root',
    data_prefix=dict(img_path='$train_images', seg_map_path='$train_masks'),
    pipeline='$train_pipeline')
eval_dataset = dict(
    type='FolderDataset',
    classes='$class_names',
    mask_values='$mask_values',
    ignore_values='$ignore_values',
    data_root='$data_root',
    data_prefix=dict(img_path='$val_images', seg_map_path='$val_masks'),
    pipeline='$eval_pipeline')

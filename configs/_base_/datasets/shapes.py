"""The embedded data set: drawn scenes with textured shapes, made from a seed on first use."""
dataset = 'shapes'
data_root = 'data/shapes'
num_shapes = 6
image_size = 96
train_images = 300
val_images = 90
crop_size = 96
batch_size = 16
num_workers = 0
persistent_workers = False

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size='$crop_size'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
eval_pipeline = '$test_pipeline'
train_dataset = dict(
    type='ShapesDataset',
    data_root='$data_root',
    split='train',
    num_classes='$num_shapes',
    num_images='$train_images',
    image_size='$image_size',
    pipeline='$train_pipeline')
eval_dataset = dict(
    type='ShapesDataset',
    data_root='$data_root',
    split='val',
    num_classes='$num_shapes',
    num_images='$val_images',
    image_size='$image_size',
    pipeline='$eval_pipeline')

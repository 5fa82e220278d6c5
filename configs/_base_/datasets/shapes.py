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

protocol = '3-1'
setting = 'overlapped'
class_order = None
split = None
eval_future = 'background'
eval_images = 'seen'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
train_dataloader = dict(
    batch_size='$batch_size',
    num_workers='$num_workers',
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='IncrementalDataset',
        mode='train',
        protocol='$protocol',
        split='$split',
        stage='$stage',
        setting='$setting',
        class_order='$class_order',
        dataset=dict(
            type='ShapesDataset',
            data_root='$data_root',
            split='train',
            num_classes='$num_shapes',
            num_images='$train_images',
            image_size='$image_size',
            pipeline='$train_pipeline')))
test_dataloader = dict(
    batch_size=1,
    num_workers='$num_workers',
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='IncrementalDataset',
        mode='eval',
        protocol='$protocol',
        split='$split',
        stage='$stage',
        class_order='$class_order',
        eval_future='$eval_future',
        eval_images='$eval_images',
        dataset=dict(
            type='ShapesDataset',
            data_root='$data_root',
            split='val',
            num_classes='$num_shapes',
            num_images='$val_images',
            image_size='$image_size',
            test_mode=True,
            pipeline='$test_pipeline')))

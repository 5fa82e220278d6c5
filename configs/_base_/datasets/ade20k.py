"""ADE20K (ADEChallengeData2016: 20,210 training images, 2,000 for validation) with 151 labels.

Label 0 is background here, a class like any other and never ignored, hence `reduce_zero_label=False`; the 150
classes keep the ids of the masks.
"""
dataset = 'ade20k'
data_root = 'data/ade/ADEChallengeData2016'
# Lists of names, one a line, without suffix; empty: the whole folder.
train_list = ''
val_list = ''
train_masks = 'annotations/training'
val_masks = 'annotations/validation'
crop_size = 512
batch_size = 32
num_workers = 4
persistent_workers = True

# The order that MiB (CVPR 2020) calls b. Its stages of 50, 100-50 and 100-10 are this one permutation, cut at
# other places. By default classes are learned in label order, as in MiB's order a, PLOP, SSUL and SATS. Chosen by
# --cfg-options 'class_order=$class_order_b'
class_order_b = [
    1, 9, 14, 18, 22, 24, 25, 27, 28, 29, 32, 38, 42, 45, 46, 47, 48, 49, 54, 56, 58, 61, 62, 63, 69,
    74, 75, 76, 77, 81, 82, 84, 90, 93, 96, 100, 103, 104, 109, 117, 119, 121, 123, 128, 129, 130, 134, 135, 136, 144,
    3, 5, 6, 8, 10, 12, 13, 19, 21, 23, 26, 31, 33, 34, 36, 39, 40, 43, 44, 53, 55, 57, 60, 70, 71,
    80, 86, 87, 91, 95, 99, 101, 105, 106, 107, 113, 116, 120, 125, 126, 131, 132, 133, 140, 142, 143, 147, 148, 149, 150,
    11, 16, 50, 64, 66, 73, 89, 92, 145, 146,
    30, 37, 51, 52, 72, 85, 98, 114, 115, 138,
    2, 35, 65, 97, 110, 111, 112, 118, 124, 141,
    4, 7, 15, 41, 67, 78, 79, 88, 108, 139,
    17, 20, 59, 68, 83, 94, 102, 122, 127, 137
]

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
# Whole images, the short side as in training: photographs of ADE20K have up to 2100 x 2100 pixels. The labels stay as
# they are, and the prediction is brought to their size.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale='$crop_scale', keep_ratio=True),
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
    type='ADE20KDataset',
    data_root='$data_root',
    ann_file='$train_list',
    data_prefix=dict(img_path='images/training', seg_map_path='$train_masks'),
    reduce_zero_label=False,
    pipeline='$train_pipeline')
eval_dataset = dict(
    type='ADE20KDataset',
    data_root='$data_root',
    ann_file='$val_list',
    data_prefix=dict(img_path='images/validation', seg_map_path='$val_masks'),
    reduce_zero_label=False,
    pipeline='$eval_pipeline')

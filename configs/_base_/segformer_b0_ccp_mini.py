"""SegFormer-B0 on ccp_mini: 1004 street photographs with a long side of 384 px, 30 classes of clothing, on a CPU."""
_base_ = ['./models/segformer.py', './datasets/folders.py', './schedules/adamw_poly.py', './default_hooks.py', './default_runtime.py']

pretrained = 'checkpoints/mit_b0.pth'
norm_cfg = dict(_delete_=True, type='BN')
model = dict(
    backbone=dict(embed_dims=32, num_layers=[2, 2, 2, 2]),
    decode_head=dict(in_channels=[32, 64, 160, 256]))

dataset = 'ccp_mini'
data_root = 'data/ccp_mini'
class_names = (
    'background', 'skin', 'hair', 'shoes', 'bag', 'pants', 'dress', 'purse', 'coat', 'blouse', 'shirt', 'skirt', 'jeans',
    'sweater', 'hat', 't-shirt', 'blazer', 'stockings', 'suit', 'scarf', 'jacket', 'sunglasses', 'belt', 'socks', 'shorts',
    'vest', 'boots', 'top', 'sandals', 'leggings', 'sweatshirt')
train_list, val_list = 'train.txt', 'val.txt'
train_images, val_images = 'images', 'images'
train_masks, val_masks = 'masks', 'masks'
train_dataset = dict(ann_file='$train_list')
eval_dataset = dict(ann_file='$val_list')
batch_size = 12
num_workers = 1

# As on voc_mini.
crop_size = 160
epochs = 6
lr = 4e-4
later_stages = dict(lr=1e-4)
head_lr_mult = 10.0

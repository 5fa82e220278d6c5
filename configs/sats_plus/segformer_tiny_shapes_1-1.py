_base_ = ['../_base_/segformer_tiny_shapes.py', './sats_plus.py']
protocol = '1-1'
num_shapes = 51
train_images = 1500

_base_ = ['../_base_/segformer_tiny_shapes.py', './sats_plus.py']
protocol = '5-1'
num_shapes = 25
train_images = 1000

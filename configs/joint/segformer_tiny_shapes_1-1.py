_base_ = ['../_base_/segformer_tiny_shapes.py', './joint.py']
protocol = 'joint'
split = '1-1'
num_shapes = 51
train_images = 1500
epochs = 45  # as many iterations as all stages of 1-1 have together

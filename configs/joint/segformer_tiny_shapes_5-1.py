_base_ = ['../_base_/segformer_tiny_shapes.py', './joint.py']
protocol = 'joint'
split = '5-1'
num_shapes = 25
train_images = 1000
epochs = 43  # as many iterations as all stages of 5-1 have together

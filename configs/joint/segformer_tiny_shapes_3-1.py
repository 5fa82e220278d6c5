_base_ = ['../_base_/segformer_tiny_shapes.py', './joint.py']
protocol = 'joint'
split = '3-1'
epochs = 37  # as many iterations as all stages of 3-1 have together

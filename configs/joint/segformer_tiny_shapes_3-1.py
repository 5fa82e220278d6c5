_base_ = ['../_base_/segformer_tiny_shapes.py', './joint.py']
protocol = 'joint'
split = '3-1'

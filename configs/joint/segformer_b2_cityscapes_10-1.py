_base_ = ['../_base_/segformer_b2_cityscapes.py', './joint.py']
protocol = 'joint'
split = '10-1'

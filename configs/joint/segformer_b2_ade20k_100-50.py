_base_ = ['../_base_/segformer_b2_ade20k.py', './joint.py']
protocol = 'joint'
split = '100-50'

_base_ = ['../_base_/segformer_b2_voc.py', './joint.py']
protocol = 'joint'
split = '15-5'

_base_ = ['../_base_/segformer_b0_voc_mini.py', './joint.py']
protocol = 'joint'
split = '15-5'

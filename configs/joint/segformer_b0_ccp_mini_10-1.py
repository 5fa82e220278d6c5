_base_ = ['../_base_/segformer_b0_ccp_mini.py', './joint.py']
protocol = 'joint'
split = '10-1'

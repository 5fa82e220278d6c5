_base_ = ['../_base_/segformer_b2_ade20k.py', './barm.py']
protocol = '100-10'

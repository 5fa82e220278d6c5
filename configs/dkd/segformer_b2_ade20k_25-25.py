_base_ = ['../_base_/segformer_b2_ade20k.py', './dkd.py']
protocol = '25-25'

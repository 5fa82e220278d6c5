_base_ = ['../_base_/segformer_b2_ade20k.py', './sats_plus.py']
protocol = '100-10'

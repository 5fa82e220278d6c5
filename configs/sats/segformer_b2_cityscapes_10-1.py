_base_ = ['../_base_/segformer_b2_cityscapes.py', './sats.py']
protocol = '10-1'

_base_ = ['../_base_/segformer_b2_cityscapes.py', './mib.py']
protocol = '10-1'

_base_ = ['../_base_/segformer_b0_voc_mini.py', './nest.py']
protocol = '15-1'

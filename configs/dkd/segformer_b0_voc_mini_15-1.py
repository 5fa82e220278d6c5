_base_ = ['../_base_/segformer_b0_voc_mini.py', './dkd.py']
protocol = '15-1'

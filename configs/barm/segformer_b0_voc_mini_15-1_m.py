_base_ = ['../_base_/segformer_b0_voc_mini.py', './barm.py']
protocol = '15-1'
memory = 40

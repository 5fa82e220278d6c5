_base_ = ['../_base_/segformer_b2_voc.py', './barm.py']
protocol = '15-1'
memory = 100

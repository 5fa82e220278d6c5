_base_ = ['../_base_/segformer_b2_voc.py', './dkd.py']
protocol = '5-3'
memory = 100

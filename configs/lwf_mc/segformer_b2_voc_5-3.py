_base_ = ['../_base_/segformer_b2_voc.py', './lwf_mc.py']
protocol = '5-3'

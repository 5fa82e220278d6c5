_base_ = ['../_base_/segformer_b2_voc.py', './sats_plus.py']
protocol = '5-3'

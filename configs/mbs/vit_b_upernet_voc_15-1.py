_base_ = ['../_base_/vit_b_upernet_voc.py', './mbs.py']
protocol = '15-1'

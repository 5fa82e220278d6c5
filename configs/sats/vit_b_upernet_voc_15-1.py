_base_ = ['../_base_/vit_b_upernet_voc.py', './sats.py']
protocol = '15-1'

_base_ = ['../_base_/segformer_b0_voc_mini.py', './sats_plus.py']
protocol = '15-5'
memory = 40

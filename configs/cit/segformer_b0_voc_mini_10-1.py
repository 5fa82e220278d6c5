_base_ = ['../_base_/segformer_b0_voc_mini.py', './cit.py']
protocol = '10-1'

_base_ = ['../_base_/segformer_b2_voc.py', './dft.py']
protocol = '5-3'

_base_ = ['../_base_/segformer_b2_voc.py', './rcil.py']
protocol = '15-1'

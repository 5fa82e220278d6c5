_base_ = ['../_base_/segformer_b2_voc_poly.py', './sats.py']
protocol = '10-1'

_base_ = ['../_base_/segformer_b2_voc.py', './star.py']
protocol = '15-5'

_base_ = ['../_base_/segformer_b0_voc_mini.py', './star.py']
protocol = '5-3'

_base_ = ['../_base_/segformer_b2_voc.py', './ssul.py']
protocol = '15-5'

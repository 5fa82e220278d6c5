_base_ = ['../_base_/segformer_b2_ade20k.py', './ssul.py']
protocol = '100-10'
saliency = 'everything'

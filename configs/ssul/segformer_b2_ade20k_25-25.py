_base_ = ['../_base_/segformer_b2_ade20k.py', './ssul.py']
protocol = '25-25'
saliency = 'everything'

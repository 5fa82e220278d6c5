_base_ = ['../_base_/segformer_b2_cityscapes.py', './finetune.py']
protocol = '11-5'

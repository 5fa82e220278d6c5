_base_ = ['../_base_/segformer_b2_voc.py', './finetune_frozen.py']
protocol = '10-1'

_base_ = ['../_base_/deeplabv3_r101_voc.py', './sats.py']
protocol = '10-1'
distillation = dict(attention=dict(source='feature'))

_base_ = ['../_base_/r50_fcn_voc.py', './sats.py']
protocol = '15-1'
distillation = dict(attention=dict(source='feature'))

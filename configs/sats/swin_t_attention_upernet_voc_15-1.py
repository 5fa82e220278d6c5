_base_ = ['../_base_/swin_t_upernet_voc.py', './sats.py']
protocol = '15-1'

_base_ = ['../_base_/twins_svt_s_upernet_voc.py', './sats.py']
protocol = '15-1'

_base_ = ['../_base_/deeplabv3_r101_voc.py', './rcil.py']
protocol = '15-1'

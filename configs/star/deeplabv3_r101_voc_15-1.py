_base_ = ['../_base_/deeplabv3_r101_voc.py', './star.py']
protocol = '15-1'

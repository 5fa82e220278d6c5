_base_ = ['../_base_/segformer_b2_voc.py', './ewf.py']
protocol = '15-1'
setting = 'disjoint'

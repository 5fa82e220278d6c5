_base_ = ['../_base_/segformer_b0_voc_mini.py', './ewf.py']
protocol = '5-3'
memory = 40

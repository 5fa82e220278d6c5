_base_ = ['../_base_/segformer_b0_voc_mini.py', './ewf.py']
protocol = '15-5'
memory = 40

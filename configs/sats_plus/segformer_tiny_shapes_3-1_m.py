_base_ = ['../_base_/segformer_tiny_shapes.py', './sats_plus.py']
protocol = '3-1'
memory = 18

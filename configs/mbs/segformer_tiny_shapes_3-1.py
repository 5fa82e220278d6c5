_base_ = ['../_base_/segformer_tiny_shapes.py', './mbs.py']
protocol = '3-1'

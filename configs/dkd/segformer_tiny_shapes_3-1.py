_base_ = ['../_base_/segformer_tiny_shapes.py', './dkd.py']
protocol = '3-1'

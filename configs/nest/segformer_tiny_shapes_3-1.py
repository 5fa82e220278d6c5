_base_ = ['../_base_/segformer_tiny_shapes.py', './nest.py']
protocol = '3-1'

_base_ = ['../_base_/segformer_tiny_shapes.py', './cit.py']
protocol = '3-1'

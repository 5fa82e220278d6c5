_base_ = ['../_base_/segformer_tiny_shapes.py', './crls.py']
protocol = '3-1'
expansion_width = 512

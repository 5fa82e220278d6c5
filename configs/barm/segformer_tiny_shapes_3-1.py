_base_ = ['../_base_/segformer_tiny_shapes.py', './barm.py']
protocol = '3-1'

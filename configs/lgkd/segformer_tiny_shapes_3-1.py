_base_ = ['../_base_/segformer_tiny_shapes.py', './lgkd.py']
protocol = '3-1'

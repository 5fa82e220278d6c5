_base_ = ['../_base_/segformer_tiny_shapes.py', './dft.py']
protocol = '3-1'

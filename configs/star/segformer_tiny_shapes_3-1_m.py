_base_ = ['../_base_/segformer_tiny_shapes.py', './star.py']
protocol = '3-1'
memory = 18

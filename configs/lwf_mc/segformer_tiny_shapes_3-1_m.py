_base_ = ['../_base_/segformer_tiny_shapes.py', './lwf_mc.py']
protocol = '3-1'
memory = 18

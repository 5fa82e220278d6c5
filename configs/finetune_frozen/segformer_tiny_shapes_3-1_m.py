_base_ = ['../_base_/segformer_tiny_shapes.py', './finetune_frozen.py']
protocol = '3-1'
memory = 18

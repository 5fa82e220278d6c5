"""SegFormer-B2 on VOC as in the paper: batch 24, crop 512, SGD, 30 epochs a stage."""
_base_ = ['./models/segformer.py', './datasets/voc.py', './schedules/sgd_exp.py', './default_hooks.py', './default_runtime.py']

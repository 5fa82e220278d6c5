"""SegFormer-B2 on ADE20K as in the paper: batch 32, crop 512, SGD, 60 epochs a stage."""
_base_ = ['./models/segformer.py', './datasets/ade20k.py', './schedules/sgd_exp.py', './default_hooks.py', './default_runtime.py']

epochs = 60

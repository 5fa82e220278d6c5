"""SegFormer-B2 on Cityscapes, which the paper has no figures on: batch 8, crop 512 x 1024, SGD, 30 epochs a stage."""
_base_ = ['./models/segformer.py', './datasets/cityscapes.py', './schedules/sgd_exp.py', './default_runtime.py']

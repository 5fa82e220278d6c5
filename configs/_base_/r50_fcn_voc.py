"""FCN-R50 on VOC with the paper's schedule. A ResNet has no self-attention: SATS takes features there."""
_base_ = ['./models/fcn.py', './datasets/voc.py', './schedules/sgd_exp.py', './default_hooks.py', './default_runtime.py']

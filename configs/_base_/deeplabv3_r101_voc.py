"""DeepLabV3-R101 on VOC with the paper's schedule. A ResNet has no self-attention: SATS takes features there."""
_base_ = ['./models/deeplabv3.py', './datasets/voc.py', './schedules/sgd_exp.py', './default_hooks.py', './default_runtime.py']

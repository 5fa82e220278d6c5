"""SegFormer-B2 on VOC with the schedule of the released code (Nesterov, polynomial decay); a config takes it
in the place of segformer_b2_voc.py."""
_base_ = ['./models/segformer.py', './datasets/voc.py', './schedules/sgd_poly.py', './default_hooks.py', './default_runtime.py']

"""LwF-MC: a sigmoid for every channel, in stage 0 too, + 10 L_kd on sigmoids (Rebuffi et al., 2017, as in MiB's code)."""
segmentation_loss = dict(type='SigmoidCrossEntropyLoss', loss_weight=1.0)
pseudo_labeler = None
distillation = dict(output=dict(type='SigmoidDistillationLoss', loss_weight=10.0))
classifier_init = 'random'

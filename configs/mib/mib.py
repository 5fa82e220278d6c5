"""MiB: background stands for the old classes in the labels and for the new ones in the distillation (Cermelli et al., 2020).

Weight of the SATS comparison; published with DeepLab is 10, and 100 on VOC 15-1:
--cfg-options distillation.output.loss_weight=10
"""
segmentation_loss = dict(type='UnbiasedCrossEntropyLoss', num_old='$num_old', loss_weight=1.0)
pseudo_labeler = None
distillation = dict(output=dict(type='UnbiasedDistillationLoss', loss_weight=40.0))
classifier_init = 'balanced'

"""LGKD on PLOP: PLOP and label-guided distillation of the output (Yang et al., ICCV 2023; see docs/label_guided.md).

The weights are those of the released script for VOC 15-1; that for 15-5, for example:
--cfg-options distillation.output.old_weight=5 distillation.output.new_weight=1
"""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = dict(type='EntropyPseudoLabeler', threshold='median', scale_images=True)
distillation = dict(
    pod=dict(type='LocalPODLoss', blocks=(0, 1, 2, 3), feature_weight=0.01, logits_weight=0.0005),
    # The weights are for a sum over the old channels; the loss divides by their number.
    output=dict(type='LabelGuidedDistillationLoss', loss_weight='$num_old', old_weight=1.0, new_weight=0.0))
classifier_init = 'balanced'

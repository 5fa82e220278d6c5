"""SATS+: attention transfer for long sequences without a memory, from parts of newer methods (see docs/sats_plus.md).

LGKD's distillation holds background, MBS's start leaves its row as it is, pixels of which the old model is unsure are
taught not to be new (MiB's cross-entropy), EWF fuses the weights after each stage, and the attention's weight is measured.
"""
segmentation_loss = dict(type='UnbiasedCrossEntropyLoss', num_old='$num_old', loss_weight=1.0)
pseudo_labeler = dict(type='EntropyPseudoLabeler', ignore_index=0)
distillation = dict(
    attention=dict(type='AdaptiveWeight', part=dict(type='CRPDistillationLoss'), ratio=1.0, every=5, initial=1.0),
    output=dict(type='LabelGuidedDistillationLoss', loss_weight=20.0))
classifier_init = 'keep_background'
method_hooks = [dict(type='WeightFusionHook')]

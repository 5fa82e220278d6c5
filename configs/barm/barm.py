"""BARM: later stages lower background by residuals, where their own classes are (Zhang and Gao, ECCV 2024; see
docs/decoupled.md)."""
segmentation_loss = dict(type='OneVsRestLoss', num_old='$num_old')
pseudo_labeler = dict(type='SigmoidPseudoLabeler', threshold=0.7)
distillation = dict(
    residual=dict(type='BackgroundResidualLoss', background_weight=5.0, new_weight=1.0),
    features=dict(type='BackgroundFeatureLoss', loss_weight=4.0),
    output=dict(type='OldOutputDistillationLoss', loss_weight=1.0))
classifier_init = 'random'

# Both models' features are compared without the noise of dropout.
# New rows learn faster than the rest, as DKD's.
method_later_stages = dict(
    model=dict(background_residuals='$stage', decode_head=dict(dropout_ratio=0.0)),
    optim_wrapper=dict(paramwise_cfg=dict(custom_keys={'decode_head.conv_seg.new': dict(lr_mult=10.0)})))

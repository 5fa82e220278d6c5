"""DKD: sigmoids without a background channel, distillation of logits and of their two terms, and new classes from an
auxiliary classifier (Baek et al., NeurIPS 2022; see docs/decoupled.md)."""
segmentation_loss = dict(type='SigmoidCrossEntropyLoss', num_old='$num_old', background=False, pos_weight=1.0)
pseudo_labeler = None
distillation = dict(
    output=dict(type='SigmoidDistillationLoss', background=False, loss_weight=5.0),
    decomposed=dict(type='DecomposedDistillationLoss', loss_weight=5.0),
    auxiliary=dict(type='AuxiliaryClassifierLoss', loss_weight=1.0))
classifier_init = 'auxiliary'

method_initial_stage = dict(model=dict(background_logit=0.0), segmentation_loss=dict(pos_weight=2.0))
# Both models' features are compared without the noise of dropout.
# New rows, which nothing but their own few pixels raises, learn ten times as fast, as published.
method_later_stages = dict(
    model=dict(background_logit=0.0, decode_head=dict(dropout_ratio=0.0)),
    optim_wrapper=dict(paramwise_cfg=dict(custom_keys={'decode_head.conv_seg.new': dict(lr_mult=10.0)})))

"""STAR: sigmoids without a background channel, old classes replayed by features around their prototypes, and features
kept where the old model predicts an old class (Chen et al., NeurIPS 2023; see docs/decoupled.md)."""
segmentation_loss = dict(type='SigmoidCrossEntropyLoss', num_old='$num_old', background=False, pos_weight=4.0)
pseudo_labeler = None
distillation = dict(
    replay=dict(type='PrototypeReplayLoss'),
    features=dict(type='PseudoLabelFeatureLoss', loss_weight=5.0),
    separation=dict(type='PrototypeSeparationLoss', loss_weight=0.05))
classifier_init = 'random'

method_initial_stage = dict(
    model=dict(background_logit=0.0, prototypes=dict(type='ReplayPrototypes', setting='$setting')))
# No loss trains the old classes' rows, so weight decay must not change them either. New rows learn faster, as published.
method_later_stages = dict(
    model=dict(
        background_logit=0.0,
        prototypes=dict(type='ReplayPrototypes', setting='$setting'),
        decode_head=dict(dropout_ratio=0.0)),
    optim_wrapper=dict(paramwise_cfg=dict(custom_keys={
        'decode_head.conv_seg.old': dict(decay_mult=0.0),
        'decode_head.conv_seg.new': dict(lr_mult=10.0)})))

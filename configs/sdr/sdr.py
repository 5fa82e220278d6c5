"""SDR: unbiased losses, and prototypes, repulsion and sparsity on the encoder's features (Michieli and Zanuttigh,
CVPR 2021; see docs/sdr.md)."""
segmentation_loss = dict(type='UnbiasedCrossEntropyLoss', num_old='$num_old')
pseudo_labeler = None
distillation = dict(
    output=dict(type='UnbiasedDistillationLoss', loss_weight=100.0),
    matching=dict(type='PrototypeMatchingLoss', loss_weight=0.01),
    attraction=dict(type='PrototypeAttractionLoss', loss_weight=0.001),
    repulsion=dict(type='RepulsionLoss', loss_weight=0.001),
    sparsity=dict(type='SparsityLoss', loss_weight=0.001))
classifier_init = 'random'

# In stage 0, as in the released code, prototypes are gathered and sparsity acts.
method_initial_stage = dict(
    model=dict(prototypes=dict(type='ClassPrototypes')),
    distillation=dict(attraction=None, repulsion=None))
method_later_stages = dict(model=dict(prototypes=dict(type='ClassPrototypes')))

"""REMINDER: PLOP, and on a new class's pixels a distillation of the old classes that resemble it (Phan et al., CVPR 2022;
see docs/more_distillations.md)."""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = dict(type='EntropyPseudoLabeler', threshold='median', scale_images=True)
distillation = dict(
    pod=dict(type='LocalPODLoss', blocks=(0, 1, 2, 3), feature_weight=0.01, logits_weight=0.0005),
    similar=dict(type='ClassSimilarityDistillationLoss', loss_weight=0.5))
classifier_init = 'balanced'

# Stage 0 gathers the prototypes that the next one needs.
method_initial_stage = dict(model=dict(prototypes=dict(type='ClassPrototypes')))
method_later_stages = dict(model=dict(prototypes=dict(type='ClassPrototypes')))

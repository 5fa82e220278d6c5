"""EWF on PLOP: after each stage the weights are fused with the previous snapshot's (Xiao et al., CVPR 2023; see
docs/between_stages.md)."""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = dict(type='EntropyPseudoLabeler', threshold='median', scale_images=True)
distillation = dict(
    pod=dict(type='LocalPODLoss', blocks=(0, 1, 2, 3), feature_weight=0.01, logits_weight=0.0005))
classifier_init = 'balanced'
method_hooks = [dict(type='WeightFusionHook')]

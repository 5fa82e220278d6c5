"""PLOP: local POD and entropy-chosen pseudo-labels, each image's cross-entropy scaled by their share (Douillard et al., 2021).

The arithmetic of the released code's thresholds: --cfg-options pseudo_labeler.threshold=released
"""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = dict(type='EntropyPseudoLabeler', threshold='median', scale_images=True)
distillation = dict(
    pod=dict(type='LocalPODLoss', blocks=(0, 1, 2, 3), feature_weight=0.01, logits_weight=0.0005))
classifier_init = 'balanced'

"""SATS: L = L_c + 20 L_a + 20 L_d on pseudo-labels, with a balanced classifier (Qiu et al., 2023, eq. (1) to (3))."""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = dict(type='EntropyPseudoLabeler')
distillation = dict(
    attention=dict(type='CRPDistillationLoss', loss_weight=20.0),
    output=dict(type='UnbiasedDistillationLoss', loss_weight=20.0))
classifier_init = 'balanced'

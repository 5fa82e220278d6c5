"""UCD on MiB: unbiased losses, and contrastive distillation of the pixels' features (Yang et al., TPAMI 2022; see
docs/more_distillations.md)."""
segmentation_loss = dict(type='UnbiasedCrossEntropyLoss', num_old='$num_old', loss_weight=1.0)
pseudo_labeler = None
distillation = dict(
    output=dict(type='UnbiasedDistillationLoss', loss_weight=10.0),
    contrast=dict(type='ContrastiveDistillationLoss', temperature=0.07, loss_weight=0.01))
classifier_init = 'balanced'

"""RCIL's losses: the pooled cube distillation of the features, on MiB's losses (Zhang et al., CVPR 2022).

The representation compensation of the convolutions is left out (docs/more_distillations.md). Weights of the released
code for VOC; on ADE20K: --cfg-options distillation.cube.feature_weight=5e-6 distillation.cube.logits_weight=5e-7
"""
segmentation_loss = dict(type='UnbiasedCrossEntropyLoss', num_old='$num_old', loss_weight=1.0)
pseudo_labeler = None
distillation = dict(
    output=dict(type='UnbiasedDistillationLoss', loss_weight=100.0),
    cube=dict(type='PooledCubeDistillationLoss', blocks=(0, 1, 2, 3), feature_weight=0.01, logits_weight=0.0005))
classifier_init = 'balanced'

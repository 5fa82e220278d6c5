"""ST-CIL: self-training on outside images, old and new model's labels fused by confidence, self-entropy made large
(Yu et al., TNNLS 2022). The weight of the entropy is ours; docs/memory.md says what differs from the paper."""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = dict(type='OldModelPseudoLabeler')
outside_labeler = dict(type='FusedPseudoLabeler')
distillation = dict(entropy=dict(type='SelfEntropyLoss', loss_weight=0.1))
classifier_init = 'balanced'

"""MBS: selective pseudo-labels, label-guided distillation, and new rows from background's, which is left as it is
(Park et al., ECCV 2024; docs/label_guided.md says which of its losses are left out)."""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = dict(type='SelectivePseudoLabeler', threshold=0.7)
distillation = dict(output=dict(type='LabelGuidedDistillationLoss', loss_weight=25.0))
classifier_init = 'keep_background'

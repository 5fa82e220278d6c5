"""CIT's distillation: sigmoids, each old class taught by the model of the stage that learned it (Ge et al., Pattern
Recognition 2025; see docs/more_distillations.md, also for what is not known of its other parts)."""
segmentation_loss = dict(type='OneVsRestLoss')
pseudo_labeler = dict(type='SigmoidPseudoLabeler', threshold=0.7)
distillation = dict(output=dict(type='AccumulativeDistillationLoss', loss_weight=1.0))
classifier_init = 'random'

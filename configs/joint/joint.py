"""Joint: one stage with all classes, the upper bound; `split` names the protocol it is reported beside."""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = None
distillation = dict()
classifier_init = 'random'

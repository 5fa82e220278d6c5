"""FT: cross-entropy alone."""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = None
distillation = dict()
classifier_init = 'random'

"""FT with a frozen encoder: from stage 1 on only the head is trained; the encoder's statistics stay too."""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = None
distillation = dict()
classifier_init = 'random'
method_later_stages = dict(model=dict(frozen=('backbone',)))

"""LwF: cross-entropy + 100 L_kd, the old model's probabilities as soft labels over the old channels (Li and Hoiem, 2016)."""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = None
distillation = dict(output=dict(type='KnowledgeDistillationLoss', loss_weight=100.0))
classifier_init = 'random'

"""RECALL: half of each batch are outside images, labelled by the old model, which also completes the background of
the stage's own (Maracani et al., ICCV 2021). The web crawl, the GAN and the frozen encoder are not part of it."""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = dict(type='OldModelPseudoLabeler')
outside_labeler = dict(type='OldModelPseudoLabeler')
distillation = dict()
classifier_init = 'random'

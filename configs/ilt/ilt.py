"""ILT: LwF + the mean squared error of the encoder's last features (Michieli and Zanuttigh, 2019).

Weights of the SATS comparison; published with DeepLab are 100 and 100:
--cfg-options distillation.output.loss_weight=100 distillation.feature.loss_weight=100
"""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = None
distillation = dict(
    output=dict(type='KnowledgeDistillationLoss', loss_weight=10.0),
    feature=dict(type='FeatureMSELoss', blocks=(3,), loss_weight=10.0))
classifier_init = 'random'

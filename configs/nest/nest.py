"""NeST on PLOP: new rows are pre-tuned as transformations of the old ones, which are frozen from then on
(Xie et al., ECCV 2024; docs/new_rows.md says how it differs). On ADE20K it pre-tunes for 15 epochs."""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = dict(type='EntropyPseudoLabeler', threshold='median', scale_images=True)
distillation = dict(
    pod=dict(type='LocalPODLoss', blocks=(0, 1, 2, 3), feature_weight=0.01, logits_weight=0.0005))
classifier_init = dict(type='pretuned', epochs=5, lr=1e-3, align_norms=True)
# Background and old classes; see docs/new_rows.md.
method_later_stages = dict(model=dict(split_classifier=True, frozen=('decode_head.conv_seg.[bo]*',)))

"""DFT*: fine-tuning of new rows alone, which have been there as negatives since stage 0 ("Revisiting Continual Semantic
Segmentation with Pre-trained Vision Models", 2025; docs/new_rows.md)."""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = None
distillation = dict()
classifier_init = 'future'
method_initial_stage = dict(model=dict(future_classes='$num_future'))
method_later_stages = dict(model=dict(
    split_classifier=True,
    future_classes='$num_future',
    frozen=('*', '!decode_head.conv_seg.[nf]*')))  # but new and future

"""AdamW with polynomial decay by iteration, the head faster than the encoder, as SegFormer is usually trained."""
epochs = 12
lr = 2e-4
later_stages = dict(lr=1e-4)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr='$lr', betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult='$head_lr_mult'), norm=dict(decay_mult=0.0))))
head_lr_mult = 5.0
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=0, end='$epochs', by_epoch=True, convert_to_iter_based=True)
]
train_cfg = dict(type='ResumableTrainLoop', max_epochs='$epochs')

"""The released code's schedule: SGD with Nesterov, polynomial decay by iteration."""
epochs = 30
lr = 0.01
later_stages = dict(lr=0.001)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr='$lr', momentum=0.9, weight_decay=1e-4, nesterov=True))
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=0, end='$epochs', by_epoch=True, convert_to_iter_based=True)
]
train_cfg = dict(type='ResumableTrainLoop', max_epochs='$epochs')

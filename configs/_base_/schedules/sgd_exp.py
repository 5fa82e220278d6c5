"""The paper's schedule: SGD, learning rate times 0.9 after every epoch, a tenth of it after stage 0."""
epochs = 30
lr = 0.01
later_stages = dict(lr=0.001)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr='$lr', momentum=0.9, weight_decay=1e-4))
param_scheduler = [dict(type='ExponentialLR', gamma=0.9, by_epoch=True)]
train_cfg = dict(type='ResumableTrainLoop', max_epochs='$epochs')

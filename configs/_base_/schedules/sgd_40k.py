"""mmseg's schedule of 40k iterations in this package's words: SGD, polynomial decay; less of both after stage 0."""
iters = 40000
lr = 0.01
later_stages = dict(iters=4000, lr=0.001)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr='$lr', momentum=0.9, weight_decay=5e-4))
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=1e-4, begin=0, end='$iters', by_epoch=False)]
train_cfg = dict(type='ResumableTrainLoop', max_iters='$iters')

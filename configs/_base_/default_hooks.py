"""mmengine's hooks and the loop of the evaluation, which mmseg's own schedules bring with them."""
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=True),
    param_scheduler=dict(type='ParamSchedulerHook'),
    # After every epoch, and every so many iterations where checkpoint_iters says so.
    checkpoint=dict(type='AtomicCheckpointHook', interval=1, iters='$checkpoint_iters', max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    finite=dict(type='FiniteHook'))
test_cfg = dict(type='TestLoop')

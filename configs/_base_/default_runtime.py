"""What every run shares: the runner of the stages, mmengine's hooks, logs and seeds."""
custom_imports = dict(imports=['mmseg_sats'], allow_failed_imports=False)
default_scope = 'mmseg'
runner_type = 'IncrementalRunner'
seed = 0
memory = 0
randomness = dict(seed='$seed')
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=True),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=True, interval=1, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'))
# Does nothing in a stage without pseudo-labels.
custom_hooks = [dict(type='PseudoLabelThresholdHook')]
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='SegLocalVisualizer', vis_backends='$vis_backends', name='visualizer')
log_processor = dict(by_epoch=True)
log_level = 'INFO'
load_from = None
test_cfg = dict(type='TestLoop')
test_evaluator = dict(type='IncrementalIoUMetric')

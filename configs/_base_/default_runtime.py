"""What every run shares: the runner of the stages, a stage's view of the data, logs and seeds."""
custom_imports = dict(imports=['mmseg_sats'], allow_failed_imports=False)
default_scope = 'mmseg'
runner_type = 'IncrementalRunner'
seed = 0
# Exemplars: how many (0: none), what picks them, and which part of a batch is replayed (None: mixed in).
memory = 0
memory_selection = dict(type='ClassBalancedMemory')
replay_share = 0.5
checkpoint_iters = None
# The last epoch of a stage counts; 0.2: the best one on a fifth of the training images, held out for that.
held_out = None
# 'cuda' refuses to start where there is no GPU; None takes one if there is one.
device = None
randomness = dict(seed='$seed')
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
# Those that a method's parts need come by themselves.
custom_hooks = [dict(type='ProgressHook')]
# WORK_DIR/report, at the end of the run; images=, attention=: how many of each (docs/report.md). None writes none.
report = dict()
# An iteration or two of the first, second and last stage before the run, so that no mistake shows only after hours;
# None leaves it out.
rehearsal = dict()
vis_backends = [dict(type='LocalVisBackend')]
# Chosen by --cfg-options 'vis_backends=$tensorboard' (or $wandb): all stages of a run on one axis.
tensorboard = [
    dict(type='LocalVisBackend'),
    dict(type='OneAxisVisBackend', backend=dict(type='TensorboardVisBackend'))]
wandb = [
    dict(type='LocalVisBackend'),
    dict(type='OneAxisVisBackend', backend=dict(type='WandbVisBackend', init_kwargs=dict(project='mmseg_sats')))]
visualizer = dict(type='SegLocalVisualizer', vis_backends='$vis_backends', name='visualizer')
log_processor = dict(by_epoch=True)
log_level = 'INFO'
load_from = None

protocol = '15-1'
split = None
setting = 'overlapped'
class_order = None
eval_future = 'background'
eval_images = 'seen'
train_dataloader = dict(
    batch_size='$batch_size',
    num_workers='$num_workers',
    persistent_workers='$persistent_workers',
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='IncrementalDataset',
        mode='train',
        seed='$seed',
        protocol='$protocol',
        split='$split',
        stage='$stage',
        setting='$setting',
        class_order='$class_order',
        background='$background',
        no_background='$no_background',
        mask_values='$mask_values',
        mask_root='$mask_root',
        dataset='$train_dataset'))
test_dataloader = dict(
    batch_size=1,
    num_workers='$num_workers',
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='IncrementalDataset',
        mode='eval',
        protocol='$protocol',
        split='$split',
        stage='$stage',
        class_order='$class_order',
        background='$background',
        no_background='$no_background',
        mask_values='$mask_values',
        mask_root='$mask_root',
        eval_future='$eval_future',
        eval_images='$eval_images',
        dataset='$eval_dataset'))
test_evaluator = dict(type='IncrementalIoUMetric')

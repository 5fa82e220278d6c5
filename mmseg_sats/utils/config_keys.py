# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The table of the top-level keys of a run's config, from which every list of keys in the package is made. Pure Python.

:func:`names` selects keys by the values of their columns.
"""

import re
from typing import Any, Literal, NamedTuple


class Key(NamedTuple):
    """A row of the table.

    Args:
        name: the key.
        read_by: who reads the key. ``'mmengine'``: its Runner and hooks. ``'package'``: this package;
            ``--cfg-options`` may set the key even in a config that lacks it. ``'config'``: only other values of
            the config use it, as the variable ``'$name'``.
        meaning: what the key sets.
        scope: where the key may be set. ``'stage'``: a stage may have its own value. ``'run'``: all stages have
            the same value. ``'runner'``: as ``'run'``, and the key is left out of the stages' configs. ``'part'``:
            the value is a dict that is merged into the configs of some stages; the key itself is left out of them.
        identity: how the key identifies a run; empty for keys that are not at the beginning of results.json. A run's
            label in the report ends with the values in which runs differ: just the value of a ``'value'`` key, the
            key's name and the value of a ``'named'`` key, nothing of an ``'unlabelled'`` key.
        compared: which part of a stage the key affects, for comparing two runs' configs: ``'training'``,
            ``'evaluation'`` or ``'validation'``.
        harmless: whether the key has no effect on the numbers of a run, so that it may change between a run and
            its ``--resume``.
        evaluates: whether the key has an effect on the evaluation alone, unless a config uses it elsewhere too.
        reported: whether the report's table of differences shows the key.
        least: the value must be a whole number that is not smaller than this; None: no such limit.
        or_none: whether None is allowed beside a whole number.
    """

    name: str
    read_by: Literal['mmengine', 'package', 'config']
    meaning: str
    scope: Literal['stage', 'run', 'runner', 'part'] = 'stage'
    identity: Literal['', 'value', 'named', 'unlabelled'] = ''
    compared: Literal['', 'training', 'evaluation', 'validation'] = ''
    harmless: bool = False
    evaluates: bool = False
    reported: bool = True
    least: int | None = None
    or_none: bool = False


KEYS = (
    # Keys that identify a run, in the order of results.json.
    Key('method', 'package', "the method's name; by default that of the config's folder", 'run', 'unlabelled'),
    Key('memory', 'package', 'how many exemplars are kept, 0 for none', 'run', 'named'),
    Key('dataset', 'package', "the data set's name", 'run', 'value'),
    Key('protocol', 'package', 'classes of the stages: m-n, or joint', 'run', 'value'),
    Key('split', 'package', 'with joint: the protocol whose base and new classes are reported', 'run', 'value'),
    Key('setting', 'package', 'overlapped, disjoint, sequential or partitioned', identity='value'),
    Key('class_order', 'package', 'a permutation of the foreground ids', 'run', 'unlabelled'),
    Key('seed', 'package', 'the seed of everything random', identity='named', least=0, or_none=True),
    # Keys that set how a stage is trained, evaluated and validated.
    Key('model', 'mmengine', 'the segmentor', compared='training'),
    Key('train_dataloader', 'mmengine', 'the training data', compared='training'),
    Key('optim_wrapper', 'mmengine', 'the optimizer', compared='training'),
    Key('param_scheduler', 'mmengine', 'the schedules', compared='training'),
    Key('train_cfg', 'mmengine', 'the training loop', compared='training'),
    Key('custom_hooks', 'mmengine', "hooks beside mmengine's", compared='training'),
    Key('load_from', 'mmengine', "a checkpoint that stage 0's training starts from", compared='training'),
    Key('data_preprocessor', 'mmengine', "the model's, where it has none of its own", compared='training'),
    Key('sync_bn', 'mmengine', 'turns batch norms into synchronised ones', compared='training'),
    Key('auto_scale_lr', 'mmengine', 'scales lr with the batch', compared='training'),
    Key('efficient_conv_bn_eval', 'mmengine', 'merges frozen batch norms into convolutions', compared='training'),
    Key('test_dataloader', 'mmengine', 'the evaluation data', compared='evaluation', evaluates=True),
    Key('test_evaluator', 'mmengine', 'the metrics', compared='evaluation', evaluates=True),
    Key('test_cfg', 'mmengine', 'the evaluation loop', compared='evaluation', evaluates=True),
    Key('val_dataloader', 'mmengine', 'data to validate on while training', compared='validation'),
    Key('val_evaluator', 'mmengine', 'the metrics of the validation', compared='validation'),
    Key('val_cfg', 'mmengine', 'the validation loop', compared='validation'),
    # Further keys of mmengine.
    Key('default_scope', 'mmengine', 'the registry that types are looked up in'),
    Key('default_hooks', 'mmengine', 'logger, timer, checkpoints and the like'),
    Key('randomness', 'mmengine', 'the seed, and how strictly it is kept'),
    Key('model_wrapper_cfg', 'mmengine', 'the wrapper of a distributed model'),
    Key('find_unused_parameters', 'mmengine', 'of the wrapper of a distributed model'),
    Key('activation_checkpointing', 'mmengine', 'parts that are computed again in backward'),
    Key('compile', 'mmengine', 'torch.compile'),
    Key('tta_model', 'mmengine', "the model of mmengine's PrepareTTAHook"),
    Key('tta_pipeline', 'mmengine', "the transforms of mmengine's PrepareTTAHook"),
    Key('custom_imports', 'mmengine', 'modules that register parts', harmless=True),
    Key('env_cfg', 'mmengine', 'cuDNN, processes, the distributed backend', harmless=True),
    Key('visualizer', 'mmengine', 'what draws and logs', harmless=True),
    Key('log_processor', 'mmengine', 'how logged numbers are smoothed', harmless=True),
    Key('log_level', 'mmengine', 'how much is logged', harmless=True, reported=False),
    Key('experiment_name', 'mmengine', "the runner's to set, for each stage", harmless=True, reported=False),
    Key('work_dir', 'mmengine', 'where the run writes', 'run', harmless=True, reported=False),
    Key('resume', 'mmengine', 'goes on with the run in the work dir', 'run', harmless=True, reported=False),
    Key('launcher', 'mmengine', 'what started the processes', 'runner', harmless=True, reported=False),
    # Keys for the stages and the run as a whole.
    Key('runner_type', 'package', 'IncrementalRunner', 'runner'),
    Key('base', 'package', 'a checkpoint that stage 0 is taken from', 'runner', reported=False),
    Key('method_initial_stage', 'package', "a method's values for stage 0", 'part'),
    Key('method_later_stages', 'package', "a method's values for the later stages", 'part'),
    Key('initial_stage', 'package', "a recipe's values for stage 0", 'part'),
    Key('later_stages', 'package', "a recipe's values for the later stages", 'part'),
    Key('method_hooks', 'package', "a method's hooks, beside custom_hooks"),
    Key('method_imports', 'package', "modules that register a method's parts", 'run', harmless=True),
    Key('import_folders', 'package', "where the user's modules were found, for the commands on a finished run", 'run',
        harmless=True, reported=False),
    Key('model_config', 'package', 'the mmseg config that the model of --base was trained with', 'run'),
    Key('held_out', 'package', 'the share of the training images that chooses the best epoch or iteration'),
    Key('memory_selection', 'package', 'what picks the exemplars', 'run'),
    Key('replay_share', 'package', 'the part of a batch that is replayed; None mixes'),
    Key('outside_dataset', 'package', 'images from outside'),
    Key('outside_labeler', 'package', 'what labels them'),
    Key('report', 'package', 'how many pictures the report shows; None writes no report', 'run', harmless=True,
        reported=False),
    Key('rehearsal', 'package', 'None starts without a rehearsal', 'runner', harmless=True, reported=False),
    Key('device', 'package', "cuda, cpu, or None for what there is", 'run', harmless=True),
    # Keys whose values the rest of a config uses.
    Key('data_root', 'package', "the data's folder"),
    Key('background', 'package', 'the class of label 0, if it counts as background', 'run'),
    Key('no_background', 'package', 'whether label 0 is a class to learn, as in Cityscapes', 'run'),
    Key('mask_values', 'package', 'the value in the masks of each class'),
    Key('mask_root', 'package', 'a folder outside data_root where masks may be'),
    Key('epochs', 'package', 'epochs of a stage', least=1),
    Key('iters', 'package', 'iterations of a stage, in place of epochs', least=1, or_none=True),
    Key('lr', 'package', 'the learning rate'),
    Key('batch_size', 'package', 'images of a batch, in each process', least=1),
    Key('crop_size', 'package', 'pixels of a side, or (h, w)'),
    Key('num_workers', 'package', 'processes that load data', harmless=True, least=0),
    Key('checkpoint_iters', 'package', 'a checkpoint every so many iterations too', harmless=True, least=1,
        or_none=True),
    Key('train_pipeline', 'package', 'transforms of the training'),
    Key('test_pipeline', 'package', 'transforms of whole images', evaluates=True),
    Key('vis_backends', 'package', 'where curves are logged', harmless=True, reported=False),
    Key('auxiliary_loss', 'config', "the auxiliary head's loss"),
    Key('centre_crop_pipeline', 'config', 'transforms of centre crops, for eval_pipeline', evaluates=True),
    Key('class_names', 'config', 'names of the classes, background first'),
    Key('class_order_b', 'config', "MiB's second order on ADE20K, for class_order"),
    Key('classifier_init', 'config', 'how a new classifier begins'),
    Key('distillation', 'config', 'losses between new and old model, by name'),
    Key('eval_dataset', 'config', 'the mmseg data set to evaluate on', evaluates=True),
    Key('eval_future', 'config', 'what classes not seen yet count as: background or ignore', evaluates=True),
    Key('eval_images', 'config', 'images to evaluate on: seen or all', evaluates=True),
    Key('eval_pipeline', 'config', 'transforms of the evaluation', evaluates=True),
    Key('expansion_width', 'config', 'channels of the random expansion that a closed-form classifier sees'),
    Key('head_lr_mult', 'config', "the head's learning rate, as a multiple of lr"),
    Key('ignore_values', 'config', 'mask values that are ignored'),
    Key('image_size', 'config', 'pixels of a side of the shapes'),
    Key('label_transforms', 'config', "what a method does to the stage's labels"),
    Key('norm_cfg', 'config', 'the norms of the heads'),
    Key('num_shapes', 'config', 'how many classes of shapes there are'),
    Key('outside_root', 'config', 'the folder of images from outside'),
    Key('persistent_workers', 'config', 'whether loading processes outlive an epoch', harmless=True),
    Key('pretrained', 'config', "the encoder's weights for stage 0"),
    Key('pseudo_labeler', 'config', 'what labels old classes in the background'),
    Key('saliency', 'config', "SSUL's saliency"),
    Key('saliency_folder', 'config', 'the folder of saliency maps'),
    Key('segmentation_loss', 'config', "the head's loss"),
    Key('tensorboard', 'config', 'a choice for vis_backends', harmless=True, reported=False),
    Key('train_dataset', 'config', 'the mmseg data set to train on'),
    Key('train_images', 'config', 'the training images: a folder, or of shapes how many'),
    Key('train_list', 'config', 'the list of the training images'),
    Key('train_masks', 'config', 'the folder of their masks'),
    Key('val_images', 'config', 'the evaluation images: a folder, or of shapes how many', evaluates=True),
    Key('val_list', 'config', 'the list of the evaluation images', evaluates=True),
    Key('val_masks', 'config', 'the folder of their masks', evaluates=True),
    Key('wandb', 'config', 'a choice for vis_backends', harmless=True, reported=False),
)  # fmt: skip


def names(**columns: Any) -> tuple[str, ...]:
    """The names of the keys that have the given values in the given columns, e.g. ``names(compared='training')``.

    They are in the order of the table.
    """
    return tuple(key.name for key in KEYS if all(getattr(key, name) == value for name, value in columns.items()))


# The keys at the beginning of results.json.
IDENTITY = tuple(key.name for key in KEYS if key.identity)
STAGE_PARTS = names(scope='part')
# Options of every data loader that do not change what is loaded, only how.
LOADING = ('num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor', 'timeout')
# Options of the model that do not change what is computed, only how.
EXECUTION = ('graph_old_model',)
_HARMLESS = re.compile(
    rf'({"|".join(names(harmless=True))})(\..*)?'
    r'|default_hooks\.(logger|timer|checkpoint|visualization)(\..*)?'
    rf'|\w+_dataloader\.({"|".join(LOADING)})'
    rf'|(\w+_stages\.)?model\.({"|".join(EXECUTION)})'
)


def is_harmless(path: str) -> bool:
    """Whether the config value at this dotted path has no effect on the numbers of a run."""
    return _HARMLESS.fullmatch(path) is not None

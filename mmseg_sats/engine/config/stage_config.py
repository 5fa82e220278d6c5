# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Builds a config per stage from a run's config: an ordinary mmseg config that any mmseg tool can run."""

import copy
import inspect
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmseg.models.backbones import MixVisionTransformer
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.engine.config.config_text import StageConfig
from mmseg_sats.engine.config.defaults import own_hooks
from mmseg_sats.engine.config.held_out import add_held_out
from mmseg_sats.engine.config.method_hooks import (
    add_method_hooks,
    hook_class,
    import_method,
    needs_all_teachers,
)
from mmseg_sats.engine.config.per_class import cut_to_stage
from mmseg_sats.engine.config.replay import add_replay
from mmseg_sats.engine.config.stage_length import prefer_length, set_length
from mmseg_sats.engine.config.trained_model import take_trained_model
from mmseg_sats.engine.config.variables import config_variables, resolve_variables
from mmseg_sats.engine.evaluation import evaluation_set
from mmseg_sats.models.heads.classifier import shape_mismatches
from mmseg_sats.models.own_options import own_class
from mmseg_sats.protocol import Protocol, Stage
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from mmseg_sats.utils.config_keys import STAGE_PARTS, names

# Position tables, which ViT and Swin interpolate to the model's image or window size while loading.
RESIZED_BY_BACKBONE = ('pos_embed', 'relative_position_bias_table', 'relative_position_index')


def stage_dir(work_dir: str | Path, index: int) -> Path:
    """The folder of stage ``index`` in a run's work dir."""
    return Path(work_dir) / f'stage_{index}'


def build_stage_config(
    cfg: Config, protocol: Protocol, stage: Stage, work_dir: str | Path
) -> Config:
    """Builds the config of one stage.

    First, partial configs are merged in: ``method_initial_stage`` or ``method_later_stages``, which a
    method's file may set, then ``initial_stage`` or ``later_stages``, which the recipe sets. (There are two
    pairs because mmengine does not allow the same key in two bases of a config.) Second, the training loop is set
    (``set_length``) and variables are resolved. Third, the values that depend on the stage are set: the sizes of the
    heads, the method's loss for auxiliary heads with plain cross-entropy, the old model, the initial weights, the
    hooks that the method's parts need, held-out and replayed images, names and folders. An optimizer without a
    constructor gets ``GroupedOptimWrapperConstructor``.

    Args:
        cfg: the run's config.
        protocol: its protocol.
        stage: the stage.
        work_dir: the run's work dir; the stage's work dir is ``stage_k`` in it.

    Returns:
        A config for ``mmengine.Runner`` and every mmseg tool.

    Raises:
        KeyError: a variable is not defined, or a loss has a weight for a class that the data set does not have.
        ValueError: a module of ``method_imports`` cannot be imported, the batch size is too small for
            replay, ``held_out`` is impossible, or a loss has weights for another number of classes.
    """
    merged = _with_stage_parts(cfg, 'initial_stage' if stage.index == 0 else 'later_stages')
    set_length(merged)
    variables = config_variables(merged) | dict(
        stage=stage.index,
        num_channels=stage.num_channels,
        num_old=stage.num_old,
        num_future=len(stage.future),
    )
    result = StageConfig(resolve_variables(merged._cfg_dict.to_dict(), variables))
    for key in names(scope='runner'):
        result.pop(key, None)
    for loader in (result.get('train_dataloader'), result.get('test_dataloader')):
        if loader and loader.get('num_workers') == 0:
            loader.persistent_workers = False  # torch refuses persistent workers if there are no workers
    # With paramwise_cfg, mmengine's constructor makes a group of every parameter, which a GPU updates one by one.
    if isinstance((result.get('optim_wrapper') or {}).get('optimizer'), dict):
        result.optim_wrapper.setdefault('constructor', 'GroupedOptimWrapperConstructor')
    # The run's --resume does not apply to each stage: a stage without checkpoints starts from its beginning.
    result.resume = False
    _set_pipeline(result)
    _set_model(result.model, stage, protocol, work_dir)
    cut_to_stage(
        _named_heads(result.model),
        stage,
        protocol.num_classes + 1,
        lambda: evaluation_set(result).class_names,
        bool(result.model.get('unknown')),
    )
    _drop_our_defaults(result.get('default_hooks') or {})
    _set_names(result, stage, work_dir)
    add_method_hooks(result)
    add_held_out(result)
    if stage.index > 0:
        result.load_from = str(stage_dir(work_dir, stage.index - 1) / 'snapshot.pth')
        add_replay(result, stage_dir(work_dir, stage.index - 1))
    return result


def _with_stage_parts(cfg: Config, part: str) -> Config:
    """A copy of the run's config in which the partial configs of that kind of stage are merged."""
    # Its file tells where the user's modules may be.
    merged = Config(copy.deepcopy(cfg._cfg_dict.to_dict()), filename=cfg.filename)
    import_method(merged)
    take_trained_model(merged)
    parts = {name: merged.pop(name, None) or {} for name in STAGE_PARTS}
    for name in (f'method_{part}', part):
        prefer_length(merged, parts[name])
        merged.merge_from_dict(parts[name])
    return merged


def _set_pipeline(cfg: Config) -> None:
    """Gives the evaluation's wrapper the transforms of the data set inside, for ``MMSegInferencer`` looks there."""
    wrapper = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    inner = wrapper.get('dataset')
    if wrapper.get('type') != 'IncrementalDataset' or wrapper.get('pipeline') is not None:
        return
    if isinstance(inner, dict) and inner.get('pipeline'):
        wrapper.pipeline = copy.deepcopy(inner.pipeline)


def _set_model(model: ConfigDict, stage: Stage, protocol: Protocol, work_dir: str | Path) -> None:
    heads = _named_heads(model)
    for head in heads.values():
        head.num_classes = stage.num_channels
        if 'out_channels' in head:
            _become_one_channel_a_class(head, stage.num_channels)
    loss = heads.pop('model.decode_head').get('loss_decode')
    for head in heads.values():
        own = head.get('loss_decode')
        # If the method's loss accounts for old classes in the background, plain cross-entropy in an auxiliary
        # head would still teach the backbone that they are background.
        # A user's own loss is not copied.
        if _is_plain(own) and isinstance(loss, dict) and own_class(loss['type']) is not None:
            head.loss_decode = dict(copy.deepcopy(loss), loss_weight=own.get('loss_weight', 1.0))
    pretrained = model.backbone.get('init_cfg') or {}
    # Later stages take all weights from the snapshot; checkpoint=None means random initial weights.
    if stage.index > 0 or ('checkpoint' in pretrained and pretrained['checkpoint'] is None):
        model.backbone.init_cfg = None
    if stage.index > 0:
        for part in (model, model.backbone):
            part.pop('pretrained', None)
        *earlier, old = (_old_model(done, work_dir) for done in protocol.stages[: stage.index])
        model.old_model = dict(old, earlier=earlier) if needs_all_teachers(model) else old


def _old_model(stage: Stage, work_dir: str | Path) -> dict[str, Any]:
    """What a later stage needs to know of the model that this stage leaves."""
    return dict(checkpoint=str(stage_dir(work_dir, stage.index) / 'snapshot.pth'), num_old=stage.num_channels)


def _become_one_channel_a_class(head: ConfigDict, channels: int) -> None:
    """Gives a head, which may have had one channel for two classes and a sigmoid, a channel for each class."""
    loss = head.get('loss_decode')
    if head.out_channels == 1 and isinstance(loss, dict) and loss.get('use_sigmoid'):
        head.loss_decode = dict(type='CrossEntropyLoss', loss_weight=loss.get('loss_weight', 1.0))
    head.out_channels = channels


def _named_heads(model: ConfigDict) -> dict[str, ConfigDict]:
    """The configs of the heads by their path in the config, the decode head first."""
    if not isinstance(model.get('decode_head'), dict):
        raise TypeError(
            "model.decode_head must be the config of one head; for a cascade as OCRNet's, expected "
            "dict(type='CascadeHead', heads=[...])"
        )
    others = model.get('auxiliary_head') or []
    if isinstance(others, list):
        named = {f'model.auxiliary_head[{index}]': head for index, head in enumerate(others)}
    else:
        named = {'model.auxiliary_head': others}
    return {'model.decode_head': model.decode_head} | named


def _drop_our_defaults(hooks: ConfigDict) -> None:
    """Drops arguments that only our default for a hook has, where another class of hook was put in its place.

    mmengine merges the two dicts, and its ``CheckpointHook`` would pass such an argument on to ``torch.save``.
    """
    for name, ours in own_hooks().default_hooks.items():
        kind = hook_class(hooks[name]) if isinstance(hooks.get(name), dict) else None
        if isinstance(kind, type):
            taken = {key for cls in kind.__mro__ for key in inspect.signature(cls.__init__).parameters}
            for argument in set(ours) - taken - {'type'}:
                hooks[name].pop(argument, None)


def _is_plain(loss: Any) -> bool:
    return isinstance(loss, dict) and loss.get('type') == 'CrossEntropyLoss' and not loss.get('use_sigmoid')


def _set_names(cfg: Config, stage: Stage, work_dir: str | Path) -> None:
    """Gives every stage its own names; otherwise a later stage would log into the folder of an earlier one."""
    cfg.work_dir = str(stage_dir(work_dir, stage.index))
    cfg.experiment_name = f'{Path(work_dir).name}_stage_{stage.index}'
    if cfg.get('visualizer'):
        cfg.visualizer.name = f'{Path(work_dir).resolve()}_stage_{stage.index}'


def check_pretrained(cfg: Config) -> None:
    """Checks before training that the encoder's pretrained weights exist and fit.

    mmengine would load any file and silently keep random weights where names differ.

    Args:
        cfg: the config of stage 0. Weights from a URL or a model zoo (``open-mmlab://resnet101_v1c``)
            are not checked.

    Raises:
        FileNotFoundError: the file does not exist; the message names the command that makes it.
        ValueError: the file cannot be read safely, has another model's names or shapes, or is an
            original SegFormer checkpoint that was not converted.
    """
    backbone_cfg = cfg.model.backbone
    init_cfg = backbone_cfg.get('init_cfg') or {}
    checkpoint = (
        init_cfg.get('checkpoint') or backbone_cfg.get('pretrained') or cfg.model.get('pretrained')
    )
    if not checkpoint or '://' in checkpoint:
        return
    unloaded = {key: value for key, value in backbone_cfg.items() if key != 'pretrained'}
    backbone = MODELS.build(dict(unloaded, init_cfg=None))
    command = f'`mmseg-sats convert-mit ORIGINAL.pth {checkpoint}`'
    how_to_make = (
        f'From the original SegFormer checkpoint make them by {command}'
        if isinstance(backbone, MixVisionTransformer)
        else "Convert weights with other names by mmsegmentation's tools/model_converters"
    )
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"the encoder's weights {checkpoint} do not exist. {how_to_make}, name others by "
            '`pretrained=FILE`, or start from random weights by `pretrained=None` (of --cfg-options)'
        )
    prefix = (init_cfg.get('prefix') or '').rstrip('.')
    state_dict = {
        key.removeprefix(f'{prefix}.'): value
        for key, value in load_checkpoint_safely(checkpoint)['state_dict'].items()
    }
    if any(key.startswith('patch_embed1.') for key in state_dict):
        raise ValueError(
            f'{checkpoint} has the original SegFormer names: convert it by {command}, '
            'with the original as ORIGINAL.pth'
        )
    problems = _misfits(state_dict, backbone)
    if problems:
        raise ValueError(
            f'{checkpoint} does not fit {type(backbone).__name__}: {"; ".join(problems[:5])}. '
            f'{how_to_make}'
        )


def _misfits(state_dict: dict[str, Tensor], backbone: nn.Module) -> list[str]:
    """Describes why the weights do not fit: tensors of another shape, or most tensors missing. Empty if they fit."""
    wrong = [
        line
        for line in shape_mismatches(state_dict, backbone)
        if not line.split(':')[0].endswith(RESIZED_BY_BACKBONE)
    ]
    own = backbone.state_dict()
    missing = [key for key in own if key not in state_dict]
    # Some backbones have more tensors than published weights, so only most of them must be there.
    if wrong or 2 * len(missing) > len(own):
        return [*wrong, *(f'{key}: missing' for key in missing)]
    return []

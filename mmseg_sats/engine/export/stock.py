# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A stage's model for an mmseg without this package: config, checkpoint, and a check that they agree."""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from safetensors.torch import save
from torch import Tensor, nn

from mmseg_sats.engine.files.snapshot import write_weights
from mmseg_sats.models.backbones.input_channels import input_channels
from mmseg_sats.models.heads.cascade import part_cascade
from mmseg_sats.models.heads.classifier_form import is_of_one_method
from mmseg_sats.models.own_options import own_class, own_options, stock_parent
from mmseg_sats.utils.checkpoint import write_atomically, write_text
from mmseg_sats.utils.user_modules import imports_of
from mmseg_sats.visualization import stage_model

_PLAIN_LOSS = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)


def export_stage(stage_dir: Path, out: Path, safetensors: bool = False) -> tuple[Path, Path]:
    """Writes ``config.py`` and ``model.pth`` that stock mmseg runs.

    Args:
        stage_dir: a finished stage, with ``config.py`` and ``snapshot.pth``.
        out: the folder to write to, made if needed.
        safetensors: whether to write the same weights as ``model.safetensors`` too, with the classes' names in
            its metadata.

    Returns:
        The paths of config and checkpoint.

    Raises:
        FileNotFoundError: the stage lacks a file.
        ValueError: the model cannot do without this package, or does not compute the same without.
    """
    cfg, model = load_for_export(stage_dir)
    if residuals := cfg.model.get('background_residuals'):
        raise ValueError(
            f'{stage_dir} cannot be exported: its background is r_0 + sum_k min(r_k, 0), with {residuals} residuals '
            'r_k (background_residuals), which no convolution of a stock head computes'
        )
    if cfg.model.get('closed_form'):
        raise ValueError(
            f'{stage_dir} cannot be exported: its classifier is computed on an expansion of the features '
            '(closed_form), which no stock head has'
        )
    stock = stock_config(cfg, model.dataset_meta)
    # Without what no prediction reads.
    weights = {key: value for key, value in model.state_dict().items() if not is_of_one_method(key)}
    check_same_logits(model, stock.model, weights)
    out.mkdir(parents=True, exist_ok=True)
    write_weights(out / 'model.pth', weights, dict(dataset_meta=model.dataset_meta))
    write_text(out / 'config.py', stock.pretty_text)
    if safetensors:
        tensors = {key: value.contiguous() for key, value in weights.items()}
        metadata = dict(format='pt', classes=json.dumps(model.dataset_meta['classes']))
        content = save(tensors, metadata)
        write_atomically(out / 'model.safetensors', lambda file: file.write(content))
    return out / 'config.py', out / 'model.pth'


def load_for_export(stage_dir: Path) -> tuple[Config, nn.Module]:
    """A stage's config and its model with the snapshot's weights, in eval mode on the CPU.

    As from ``mmseg.apis.init_model``, but no code in the checkpoint is run.

    Raises:
        FileNotFoundError: ``config.py`` or ``snapshot.pth`` is not there.
        ValueError: the snapshot is no checkpoint, or lacks tensors of the model.
    """
    stage = stage_model.load_stage(stage_dir)
    model = stage.model.cpu()
    # Where mmseg.apis look for them.
    model.cfg, model.dataset_meta = stage.cfg, dict(classes=stage.classes, palette=stage.palette)
    # The weights come from the checkpoint, no longer from there.
    for part in ('backbone', 'decode_head'):
        stage.cfg.model[part].pop('init_cfg', None)
    return stage.cfg, model


def stock_config(cfg: Config, dataset_meta: dict[str, Any]) -> Config:
    """The config of the same model without a type of this package, enough for ``mmseg.apis`` and mmseg's tools.

    Its types are mmseg's, and those of the user's modules, which it then imports.

    Args:
        cfg: a stage's config.
        dataset_meta: ``classes`` and ``palette``.

    Raises:
        ValueError: a part of the model exists in this package alone.
    """
    parted = part_cascade(cfg.model.to_dict())
    model = _in_stock_words(dict(parted, type=cfg.model.type))
    if parted['type'] != cfg.model.type:
        model['type'] = parted['type']
    own = _own_modules(model, imports_of(cfg))
    return Config(
        dict(
            default_scope='mmseg',
            **(dict(custom_imports=dict(imports=own, allow_failed_imports=False)) if own else {}),
            model=model,
            test_pipeline=cfg.test_pipeline,
            test_dataloader=dict(
                batch_size=1,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dict(
                    type='BaseSegDataset', metainfo=dataset_meta, pipeline=cfg.test_pipeline
                ),
            ),
            visualizer=dict(
                type='SegLocalVisualizer',
                vis_backends=[dict(type='LocalVisBackend')],
                name='visualizer',
            ),
        )
    )


def _own_modules(model: Any, names: Sequence[str]) -> list[str]:
    """Those of the modules that register a part of the model: the user's own, such as a backbone's."""
    found = {MODELS.get(kind).__module__ for kind in _types_in(model) if MODELS.get(kind) is not None}
    return [name for name in names if any(f'{module}.'.startswith(f'{name}.') for module in found)]


def _types_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get('type'), str):
            yield value['type']
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _types_in(item)


def _in_stock_words(value: Any) -> Any:
    """A copy in which each type of this package is replaced by the type of mmseg's that it extends."""
    if isinstance(value, list | tuple):
        return type(value)(_in_stock_words(item) for item in value)
    if not isinstance(value, dict):
        return value
    cfg = {
        key: _PLAIN_LOSS if key == 'loss_decode' else _in_stock_words(item)
        for key, item in value.items()
        if key not in own_options(value.get('type'))
    }
    own = own_class(value.get('type'))
    if own is not None:
        cfg['type'] = stock_parent(own).__name__
    return cfg


def window_of(model: nn.Module) -> tuple[int, int] | None:
    """(h, w) of the windows that a segmentor is tested in, the only size that its encoder may take; or None."""
    test_cfg = model.test_cfg or {}
    return tuple(test_cfg['crop_size']) if test_cfg.get('mode') == 'slide' else None


@torch.no_grad()
def check_same_logits(
    model: nn.Module, stock_cfg: dict[str, Any], state_dict: dict[str, Tensor]
) -> None:
    """Raises ValueError unless stock mmseg computes the same from the same weights.

    Args:
        model: the stage's model, in eval mode.
        stock_cfg: config of the same model with mmseg's own types.
        state_dict: the stage's weights.
    """
    with DefaultScope.overwrite_default_scope('mmseg'):
        stock = MODELS.build(stock_cfg)
    unknown = set(state_dict) ^ set(stock.state_dict())
    if unknown:
        raise ValueError(
            f'{type(model).__name__} cannot be exported: its weights and those of the stock '
            f'{type(stock).__name__} differ by {sorted(unknown)[:5]}'
        )
    stock.load_state_dict(state_dict)
    # In double precision, so that a difference cannot come from rounding.
    size = window_of(model) or (96, 128)
    images = torch.randn(1, input_channels(model), *size, generator=torch.Generator().manual_seed(0)).double()
    ours, theirs = (
        copy.deepcopy(part).double().eval()(images, mode='tensor') for part in (model, stock)
    )
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs  # some of mmseg's heads return more than logits
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9):
        raise ValueError(
            f'{type(model).__name__} cannot be exported: stock {type(stock).__name__} gives other '
            f'logits from the same weights ({tuple(ours.shape)} and {tuple(theirs.shape)})'
        )

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The config of a run that adds classes to a trained model, as a file to read, change and repeat."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmseg.registry import MODELS

from mmseg_sats.api.class_table import IGNORED, ClassTable
from mmseg_sats.api.folders import MaskedImages
from mmseg_sats.api.old_model import OldModel
from mmseg_sats.models import LeanSegformerHead, backbones
from mmseg_sats.models.own_options import stock_parent
from mmseg_sats.utils.installed import CONFIGS, method_names
from mmseg_sats.utils.spelling import check_choice

_LEAST_EPOCHS = 12
_LEAST_ITERATIONS = 700
_BATCH_SIZE = 8


def config_text(
    old: OldModel,
    base: Path,
    table: ClassTable,
    new: MaskedImages,
    replayed: MaskedImages | None,
    val: MaskedImages,
    val_numbers: Mapping[str, int],
    method: str,
    values: Mapping[str, Any],
) -> str:
    """The text of the config, which inherits from the package's.

    Args:
        old: the old model.
        base: its checkpoint, see :meth:`OldModel.base`.
        table: the classes.
        new: the images of the new classes.
        replayed: images of old classes, their masks with the numbers of ``table.numbers_for_all()``; None for none.
        val: the images for evaluation.
        val_numbers: name to number in their masks.
        method: name of a method of this package.
        values: what the caller sets, by dotted key of the config.

    Raises:
        ValueError: there is no such method, or its models cannot be exported.
    """
    check_choice('method', method, [name for name in method_names() if name != 'joint'])  # joint has one stage
    recipe = Config.fromfile(CONFIGS / method / f'{method}.py')
    _check_export(method, recipe)
    numbers = table.numbers_for_all()
    own = dict(img_path='$val_images', seg_map_path='$val_masks')
    content = dict(
        method=method,
        dataset=Path(new.images).parent.name,
        model_config=str(old.config.resolve()),
        base=str(base.resolve()),
        protocol=table.protocol,
        class_names=list(table.names),
        # Old classes that are drawn beside new ones keep their labels.
        setting='sequential' if table.matched else 'overlapped',
        mask_values={name: n for name, n in numbers.items() if name != IGNORED and (replayed or name in table.drawn)},
        ignore_values=[] if numbers[IGNORED] == 255 else [numbers[IGNORED]],
        data_root='',
        train_images=new.images,
        train_masks=new.masks,
        val_images=val.images,
        val_masks=val.masks,
        train_dataset=dict(
            ann_file=new.list_file,
            palette=table.colours(old.palette),
            more_folders=[[replayed.images, replayed.masks]] if replayed else [],
        ),
        eval_dataset=dict(
            _delete_=True, type='FolderDataset', classes='$class_names', mask_values=dict(val_numbers),
            data_prefix=own, ann_file=val.list_file, pipeline='$eval_pipeline',
            palette=table.colours(old.palette),
        ),
        memory=_memory(table, new, replayed),
        **_as_trained(old),
        **_model(old, table, recipe, replayed is not None),
    )  # fmt: skip
    batch_size = values.get('batch_size') or content.get('batch_size') or _BATCH_SIZE
    stage_images = int(new.showing(table.drawn[name] for name in table.new).sum())
    content['batch_size'] = min(batch_size, max(2, stage_images))
    if values.get('iters') is None:
        content['epochs'] = max(_LEAST_EPOCHS, math.ceil(_LEAST_ITERATIONS * content['batch_size'] / stage_images))
    bases = ['mmseg_sats::_base_/add_classes.py', f'mmseg_sats::{method}/{method}.py']
    cfg = Config(content)
    cfg.merge_from_dict({key: value for key, value in values.items() if key != 'batch_size'})
    return (
        f'"""Adds {", ".join(table.new)} to {old.checkpoint.name}; made by `mmseg-sats add`."""\n'
        f'_base_ = {bases}\n{cfg.pretty_text}'
    )


def _memory(table: ClassTable, new: MaskedImages, replayed: MaskedImages | None) -> int:
    """Images to be replayed: all that show an old class, if some of them would not be used otherwise; else 0."""
    matched = new.showing(table.drawn[name] for name in table.matched)
    unused = matched & ~new.showing(table.drawn[name] for name in table.new)
    if replayed is None and not unused.any():
        return 0
    count = int(matched.sum()) + (0 if replayed is None else len(replayed))
    return max(count, len(table.old))


def _as_trained(old: OldModel) -> dict[str, Any]:
    """The transforms, sizes and batch size that the old model was trained with, as far as its config has them."""
    train = old.pipeline('train_dataloader')
    found = dict(
        train_pipeline=None if old.crop_size is None else train,  # ours crops
        test_pipeline=old.pipeline('test_dataloader'),
        crop_size=old.crop_size,
        batch_size=old.batch_size,
    )
    return {key: value for key, value in found.items() if value is not None}


def attention_backbone(stock: str) -> str | None:
    """The backbone of this package that is an mmseg backbone and also returns its self-attention; None if none is."""
    own = (MODELS.get(name) for name in backbones.__all__)
    return next((cls.__name__ for cls in own if cls is not None and stock_parent(cls).__name__ == stock), None)


def _check_export(method: str, recipe: Config) -> None:
    """Refuses a method whose models :func:`export_stage` refuses, which would be after the training."""
    for stages in ('method_initial_stage', 'method_later_stages'):
        model = (recipe.get(stages) or {}).get('model') or {}
        for option in ('unknown', 'background_residuals', 'closed_form'):
            if model.get(option):
                raise ValueError(
                    f'method={method!r}: its models have model.{option}, which stock mmseg cannot run; '
                    'expected another method, such as sats'
                )


def _model(old: OldModel, table: ClassTable, recipe: Config, replay: bool) -> dict[str, Any]:
    """What depends on the old model: this package's backbone and head, or a distillation without attention; labels."""
    stock = old.cfg.model.backbone.type
    own = attention_backbone(stock)
    parts, labeler = recipe.get('distillation') or {}, recipe.get('pseudo_labeler') or {}
    distillation: dict[str, Any] = {}
    if own is None and not stock.startswith('Attention') and 'attention' in parts:
        distillation['attention'] = dict(source='feature')
    if not table.old_background and 'output' in parts:
        # MiB's distillation lets new classes take probability from background alone, which has none yet.
        distillation['output'] = None
    model: dict[str, Any] = {} if own is None else dict(backbone=dict(type=own))
    if old.cfg.model.decode_head.type == stock_parent(LeanSegformerHead).__name__:
        model['decode_head'] = dict(type=LeanSegformerHead.__name__)
    found: dict[str, Any] = dict(model=model) if model else {}
    if distillation:
        found['distillation'] = distillation
    if labeler.get('type') == 'EntropyPseudoLabeler' and table.old_background and not replay:
        # Nothing but the old model shows where new classes end: its background counts where it is unsure, too.
        found['pseudo_labeler'] = dict(threshold=1.0)
    return found

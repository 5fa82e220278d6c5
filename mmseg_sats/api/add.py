# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Adds classes to a trained mmseg model: from a checkpoint and folders of images to a model that knows both."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prettytable import PrettyTable

from mmseg_sats.api.added_config import attention_backbone, config_text
from mmseg_sats.api.class_table import BACKGROUND, ClassTable, match_classes, numbered
from mmseg_sats.api.folders import MaskedImages, hold_out, masked_images
from mmseg_sats.api.old_images import picked_old_images, write_old_images
from mmseg_sats.api.old_model import read_old_model
from mmseg_sats.api.run import Run, train
from mmseg_sats.engine.export.model_card import ModelCard, write_model_card
from mmseg_sats.engine.export.stock import export_stage
from mmseg_sats.utils.checkpoint import write_json, write_text

CONFIG, FIGURES = 'add_classes.py', 'add_classes.json'

Names = str | Sequence[str] | Mapping[str, int]


@dataclass(frozen=True, eq=False)
class AddedClasses:
    """A model that knows the old classes and the new ones.

    Args:
        out: the folder with ``config.py``, ``model.pth``, ``model.safetensors`` and ``README.md``, the model card.
        run: the run that trained it.
        table: which classes it has, and where they come from.
        before: IoU by class of the old model, in percent; None where no image for evaluation shows a class.
        after: the same of the new model.
        seconds: how long everything took.
        peak_memory: the most memory that was in use, MiB: of the GPU if there is one, else of the process; None where
            the system does not tell.
    """

    out: Path
    run: Run
    table: ClassTable
    before: dict[str, float | None]
    after: dict[str, float | None]
    seconds: float
    peak_memory: float | None

    def mean(self, classes: Sequence[str], when: str = 'after') -> float | None:
        """The mean IoU of classes ``before`` or ``after``; None if one of them was not measured."""
        values = [getattr(self, when).get(name) for name in classes]
        return None if None in values else sum(values) / len(values)

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """The classes that no image for evaluation shows."""
        return tuple(name for name in self.table.names if self.after[name] is None)

    def rows(self) -> PrettyTable:
        """IoU of each class before and after, and what was forgotten, for a person to read."""
        table = PrettyTable(['class', 'before', 'after', 'forgotten'])
        table.align['class'] = 'l'
        table.float_format = '.1'
        groups = {'mean of the old classes': self.table.old, 'mean of the new classes': self.table.new}
        lines = [(name, self.before.get(name), self.after[name]) for name in self.table.names]
        lines += [(title, self.mean(names, 'before'), self.mean(names)) for title, names in groups.items()]
        for place, (title, before, after) in enumerate(lines, start=1):
            lost = None if before is None or after is None else before - after
            cells = ['-' if value is None else float(value) for value in (before, after, lost)]
            table.add_row([title, *cells], divider=place == len(self.table.names))
        return table


def add_classes(
    checkpoint: str | Path,
    config: str | Path,
    images: str | Path,
    masks: str | Path,
    classes: Names,
    *,
    old_images: str | Path | None = None,
    old_masks: str | Path | None = None,
    old_classes: Names | None = None,
    memory: int = 0,
    val_images: str | Path | None = None,
    val_masks: str | Path | None = None,
    val_classes: Names | None = None,
    background: str | None = None,
    lr: float | None = None,
    out: str | Path = 'work_dirs/add',
    method: str = 'sats',
    licence: str = 'unknown',
    resume: bool = False,
    **values: Any,
) -> AddedClasses:
    """Adds classes to a trained model, as ``mmseg-sats add`` does (docs/add_classes.md).

    Args:
        checkpoint: of any mmseg model whose head is based on ``BaseDecodeHead``, with or without background.
        config: the mmseg config that it was trained with.
        images: folder of images that show the new classes.
        masks: folder of their masks, ``name.png`` for every ``name.jpg``: a number per pixel. 0 is background, and
            255 is ignored. Old classes need not be drawn.
        classes: the classes that the masks show: ``'cat,dog'`` have the numbers 1 and 2, ``'cat=11,dog=12'`` others.
            Those that the old model has too are matched by name.
        old_images: folder of a few images with old classes, which are replayed.
        old_masks: their masks, with the numbers that the old model was trained with.
        old_classes: names and numbers in ``old_masks``, if the old model's config does not have them; they also
            name the channels of a checkpoint that does not.
        memory: instead of ``old_images``: this many images out of the training data that ``config`` names.
        val_images: folder of images for evaluation; by default every fifth of ``images`` is kept for it.
        val_masks: their masks. Their numbers are the channels of the new model, as the printed table has them.
        val_classes: names and numbers in ``val_masks``, if they are others.
        background: the old model's class that stands for everything else, if it is not called background.
        lr: the learning rate; by default that of ``_base_/add_classes.py``.
        out: where to write.
        method: a method of this package.
        licence: of the new model, for its card.
        resume: whether to go on with a run that was interrupted; its config stays as it was written.
        **values: further keys of the run's config, as for :func:`mmseg_sats.api.train`: ``epochs`` or
            ``iters``, ``batch_size`` and so on. By default there are 12 epochs, or as many as make 700 iterations.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        ValueError: names, numbers or options do not fit each other, or the model cannot grow.
    """
    start, out = time.perf_counter(), Path(out)
    _check_pairs(old_images, old_masks, val_images, val_masks, memory)
    if (out / 'run').exists() and not resume:
        raise ValueError(f'{out} is in use: it holds a run. Resume it (--resume), or name another folder (--out)')
    if lr is not None:
        values['later_stages.lr'] = lr
    drawn = numbered(classes, 'classes')
    old_numbers = None if old_classes is None else numbered(old_classes, 'old_classes')
    old = read_old_model(checkpoint, config, None if old_numbers is None else list(old_numbers), background)
    table = match_classes(old.classes, drawn, old.background is not None)
    print(table.rows(), flush=True)
    backbone = old.cfg.model.backbone.type
    if attention_backbone(backbone) is None:
        print(f'note: {backbone} gives no self-attention; a method that transfers attention takes its features instead')
    for note in table.look_alikes():
        print(f'note: {note}')
    new = masked_images(images, masks)
    _check_shown(new, table)
    if val_images is None:
        new, val = hold_out(new, out)
        val_numbers = table.drawn
    else:
        val = masked_images(val_images, val_masks)
        val_numbers = {name: channel for channel, name in enumerate(table.names)}
    if val_classes is not None:
        val_numbers = table.own_names(numbered(val_classes, 'val_classes'), 'val_classes')
    if not resume:
        pairs = masked_images(old_images, old_masks).pairs if old_images else ()
        pairs = picked_old_images(old, memory) if memory else pairs
        own_numbers = table.own_names(old_numbers or old.numbers, 'old_classes')
        replayed = write_old_images(pairs, own_numbers, table, out / 'old_images') if pairs else None
        text = config_text(old, old.base(out), table, new, replayed, val, val_numbers, method, values)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / CONFIG, text)
    elif not (out / CONFIG).is_file():
        raise FileNotFoundError(f'{out / CONFIG} does not exist: there is nothing to resume in {out}')
    run = train(out / CONFIG, work_dir=out / 'run', resume=resume)
    before, after = _figures(run, table, val, val_numbers)
    added = AddedClasses(out, run, table, before, after, time.perf_counter() - start, _peak_memory())
    command = _command(
        checkpoint, config, images=images, masks=masks, classes=classes, old_images=old_images, old_masks=old_masks,
        old_classes=old_classes, memory=memory, val_images=val_images, val_masks=val_masks, val_classes=val_classes,
        background=background, method=method, cfg_options=values,
    )  # fmt: skip
    held_out = '' if val_images else ', which were not trained on' if val.list_file else ', the training images'
    _write(added, command, f'{len(val)} images of {val_images or images}{held_out}', licence)
    return added


def _figures(
    run: Run, table: ClassTable, val: MaskedImages, numbers: Mapping[str, int]
) -> tuple[dict[str, float | None], ...]:
    """IoU by class before and after; None for a class that no image for evaluation shows, or the model lacks."""
    shown = {name for name, number in {BACKGROUND: 0, **numbers}.items() if val.showing([number]).any()}
    before, after = (
        {name: iou if name in shown else None for name, iou in stage['iou'].items()} for stage in run.by_stage
    )
    if not table.old_background:
        before[BACKGROUND] = None
    return before, after


def _command(checkpoint: str | Path, config: str | Path, **options: Any) -> str:
    """The command that does the same."""
    words = ['mmseg-sats', 'add', str(checkpoint), str(config)]
    for name, value in options.items():
        if isinstance(value, Mapping):
            pairs = [f'{key}={item}' for key, item in value.items()]
            value = ','.join(pairs) if name.endswith('classes') else pairs
        elif name.endswith('classes') and not isinstance(value, str | None):
            value = ','.join(value)
        if value:
            words += [f'--{name.replace("_", "-")}', *(value if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def _check_pairs(old_images: Any, old_masks: Any, val_images: Any, val_masks: Any, memory: int) -> None:
    for kind, images, masks in (('old', old_images, old_masks), ('val', val_images, val_masks)):
        if (images is None) != (masks is None):
            given, wanted = ('images', 'masks') if masks is None else ('masks', 'images')
            raise ValueError(f'{kind}_{given} goes with {kind}_{wanted}, which is missing')
    if old_images is not None and memory:
        raise ValueError('old_images and memory both name old images: expected one of them')


def _check_shown(new: MaskedImages, table: ClassTable) -> None:
    """Raises ValueError if the new masks hold an unknown number, or show none of a class."""
    known = {*table.drawn.values(), 0, 255}
    strange = [number for number in range(256) if number not in known and new.showing([number]).any()]
    if strange:
        mask = new.pairs[int(new.showing(strange).argmax())][1]
        raise ValueError(
            f'classes does not name the numbers {strange} in the masks (the first such mask is {mask}); named are '
            f'{dict(table.drawn)}, 0 for background and 255 for ignored pixels'
        )
    absent = [name for name, number in table.drawn.items() if name != BACKGROUND and not new.showing([number]).any()]
    if absent:
        raise ValueError(
            f'classes names {absent[0]} with the number {table.drawn[absent[0]]}, which no mask in {new.masks} '
            f'holds; they hold {[number for number in range(256) if new.showing([number]).any()]}'
        )


def _peak_memory() -> float | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def _write(added: AddedClasses, command: str, data: str, licence: str) -> None:
    """The model for mmseg, its weights as safetensors, its card, and the figures."""
    out, table = added.out, added.table
    export_stage(added.run.stage_dir(), out, safetensors=True)
    groups = {'background and all': table.names, 'the old': table.old, 'the new': table.new}
    metrics = {f'mIoU of {group} classes': added.mean(names) for group, names in groups.items()}
    card = ModelCard(
        name=out.resolve().name,
        summary=(
            f'A semantic segmentation model (MMSegmentation) that knows {len(table.names)} classes. The classes '
            f'{", ".join(table.new)} were added to a trained model by continual learning.'
        ),
        classes=table.names,
        added=table.new,
        method=added.run.results['method'],
        protocol=table.protocol,
        data=data,
        metrics=metrics,
        iou={name: (added.before.get(name), added.after[name]) for name in table.names},
        commands=(
            command,
            f'mmseg-sats train {CONFIG} --work-dir ANOTHER_FOLDER',
            'mmseg-sats predict run/stage_1 IMAGES',
        ),
        licence=licence,
        parameters=sum(parameter.numel() for parameter in added.run.model().parameters()),
    )  # fmt: skip
    write_model_card(out / 'README.md', card)
    figures = dict(
        old=list(table.old), new=list(table.new), matched=list(table.matched), before=added.before, after=added.after,
        seconds=added.seconds, peak_memory_mib=added.peak_memory, metrics=metrics,
    )  # fmt: skip
    write_json(out / FIGURES, figures)

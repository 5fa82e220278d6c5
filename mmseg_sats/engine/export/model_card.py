# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A model card: what a model knows, how it was made and how good it is, in the form that model hubs read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mmseg_sats.utils.checkpoint import write_text


@dataclass(frozen=True)
class ModelCard:
    """The contents of a card.

    Args:
        name: of the model.
        summary: one or two sentences: what it is.
        classes: by channel, background included.
        added: those of them that were added last.
        method: name of the method that trained it.
        protocol: such as ``15-5``.
        data: name of the data set that it was evaluated on.
        metrics: percent by name, such as ``mIoU``; those without a value are left out.
        iou: percent by class, before and after; None where it was not measured.
        commands: the commands that made it and that use it, a line each.
        licence: a licence's identifier, such as ``apache-2.0``.
        parameters: how many numbers the model has.
    """

    name: str
    summary: str
    classes: Sequence[str]
    added: Sequence[str]
    method: str
    protocol: str
    data: str
    metrics: Mapping[str, float | None]
    iou: Mapping[str, tuple[float | None, float | None]]
    commands: Sequence[str]
    licence: str
    parameters: int

    @property
    def text(self) -> str:
        """The card: metadata in YAML, then Markdown."""
        measured = {name: round(value, 2) for name, value in self.metrics.items() if value is not None}
        head = dict(
            license=self.licence,
            library_name='mmsegmentation',
            pipeline_tag='image-segmentation',
            tags=['image-segmentation', 'semantic-segmentation', 'continual-learning', 'mmsegmentation', 'mmseg_sats'],
            metrics=['mean_iou'],
        )
        if measured:
            results = [dict(type='mean_iou', name=f'{name} (percent)', value=value) for name, value in measured.items()]
            task = dict(type='image-segmentation', name='semantic segmentation')
            data = dict(type='image-folder', name=self.data)
            head['model-index'] = [dict(name=self.name, results=[dict(task=task, dataset=data, metrics=results)])]
        rows = [
            f'| {channel} | {name} | {"new" if name in self.added else ""} | {_cell(self.iou, name, 0)} '
            f'| {_cell(self.iou, name, 1)} |'
            for channel, name in enumerate(self.classes)
        ]
        return '\n'.join([
            '---',
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
            '---',
            f'# {self.name}',
            '',
            self.summary,
            '',
            f'- method: {self.method}, protocol {self.protocol}; {self.parameters:,} parameters',
            f'- evaluated on: {self.data}',
            f'- licence: {self.licence}',
            *(f'- {name}: {value}' for name, value in measured.items()),
            '',
            '## Classes',
            '',
            'IoU in percent on the same images, before and after the classes marked "new" were added.',
            '',
            '| channel | class | | before | after |',
            '|---|---|---|---|---|',
            *rows,
            '',
            '## Commands',
            '',
            *(f'    {line}' for line in self.commands),
            '',
            'Made with mmseg_sats. `model.pth` and `model.safetensors` hold the same weights. MMSegmentation reads',
            "them without mmseg_sats: `mmseg.apis.init_model('config.py', 'model.pth')`.",
            '',
        ])  # fmt: skip


def _cell(iou: Mapping[str, tuple[float | None, float | None]], name: str, place: int) -> str:
    value = iou.get(name, (None, None))[place]
    return '-' if value is None else f'{value:.1f}'


def write_model_card(path: str | Path, card: ModelCard) -> None:
    """Writes the card; hubs expect it as ``README.md`` beside the weights."""
    write_text(path, card.text)

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Reads what a run wrote into its work dir, for drawing: results, losses, times, config."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmseg_sats.utils.config_keys import names

# What can differ between two runs of a method, in the order in which a label names it.
NAMED = names(identity='named')
LABEL_KEYS = names(identity='value') + NAMED
# Keys of a config that say where a run lives, not what it does.
PLACE_KEYS = names(reported=False)


@dataclass(frozen=True, eq=False)
class StageRecord:
    """One finished stage.

    Args:
        folder: its ``stage_k``.
        results: its entry in results.json.
        seconds: how long its training took; None where it was taken from a checkpoint.
        scalars: mmengine's log lines of the training, one dict each, ordered by iteration.
    """

    folder: Path
    results: dict[str, Any]
    seconds: float | None
    scalars: tuple[dict[str, Any], ...]

    @property
    def index(self) -> int:
        """Number of the stage."""
        return self.results['stage']

    @cached_property
    def memory(self) -> float | None:
        """The most accelerator memory that mmengine logged, MiB; None where it logged none."""
        return max((line['memory'] for line in self.scalars if 'memory' in line), default=None)

    @cached_property
    def loss_means(self) -> dict[str, float]:
        """Mean over the logged lines of each part of the loss, by name, in the order of the log."""
        names = dict.fromkeys(name for line in self.scalars for name in loss_parts(line))
        return {
            name: sum(loss_parts(line).get(name, 0.0) for line in self.scalars) / len(self.scalars)
            for name in names
        }


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run with at least one finished stage.

    Args:
        folder: its work dir.
        results: the contents of results.json.
        stages: the finished stages.
        config: the run's config as one flat dict, ``'model.backbone.type'`` to value.
        label: what the pictures call it.
    """

    folder: Path
    results: dict[str, Any]
    stages: tuple[StageRecord, ...]
    config: dict[str, Any] = field(repr=False)
    label: str

    @property
    def class_names(self) -> list[str]:
        """Background and the classes seen at the end, by channel."""
        return list(self.results['stages'][-1]['iou'])


def loss_parts(line: Mapping[str, Any]) -> dict[str, float]:
    """The weighted parts of the loss in one log line; their sum, ``loss``, is left out."""
    return {
        name: value
        for name, value in line.items()
        if 'loss' in name and name != 'loss' and isinstance(value, int | float)
    }


def load_runs(work_dirs: Sequence[str | Path]) -> list[RunRecord]:
    """Reads several runs and gives each a label of its own.

    Args:
        work_dirs: the work dirs; one that is named twice counts once.

    Raises:
        FileNotFoundError: a folder holds no results.json; the message names runs nearby.
        ValueError: a file is not what a run writes.
    """
    folders = list({Path(folder).resolve(): Path(folder) for folder in work_dirs}.values())
    results = [_read_results(folder) for folder in folders]
    labels = run_labels(results, [folder.resolve().name for folder in folders])
    return [
        RunRecord(folder, result, tuple(_stages(folder, result)), _flat_config(folder), label)
        for folder, result, label in zip(folders, results, labels, strict=True)
    ]


def run_labels(results: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> list[str]:
    """The methods' names, followed by whatever is needed to tell the runs apart.

    Args:
        results: contents of results.json, one per run.
        folders: names of the work dirs, the last resort.

    Returns:
        One label per run; all differ.
    """
    labels = []
    for one in results:
        namesakes = [other for other in results if other['method'] == one['method']]
        differing = [
            key for key in LABEL_KEYS if any(other.get(key) != one.get(key) for other in namesakes)
        ]
        words = [_label_word(key, one.get(key)) for key in differing]
        labels.append(' '.join([one['method'], *(word for word in words if word)]))
    labels = [
        label if labels.count(label) == 1 else f'{label} ({folder})'
        for label, folder in zip(labels, folders, strict=True)
    ]
    # Work dirs of the same name in different places.
    return [
        label if labels.count(label) == 1 else f'{label} {labels[: i + 1].count(label)}'
        for i, label in enumerate(labels)
    ]


def _label_word(key: str, value: Any) -> str:
    if value is None or (key == 'memory' and value == 0):
        return ''
    return f'{key} {value}' if key in NAMED else str(value)


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / 'results.json'
    if not path.is_file():
        near = sorted(found.parent.name for found in folder.glob('*/results.json'))
        more = f' and {len(near) - 3} more' if near[3:] else ''
        hint = f'; it holds the runs {", ".join(near[:3])}{more}: name those, as in {folder}/*' if near else ''
        if len(near) == 1:
            hint = f', did you mean {folder / near[0]}?'
        raise FileNotFoundError(
            f"{path} does not exist: expected a run's work dir with at least one finished stage{hint}"
        )
    try:
        results = json.loads(path.read_text(encoding='utf-8'))
        results['method'], results['final'], results['stages'][-1]['iou']
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f'{path} is not what a run writes: {error!r}') from error
    return results


def _stages(folder: Path, results: Mapping[str, Any]) -> Iterator[StageRecord]:
    for entry in results['stages']:
        stage = folder / f'stage_{entry["stage"]}'
        metrics = stage / 'metrics.json'
        seconds = None
        if metrics.is_file() and entry['images'] is not None:
            seconds = json.loads(metrics.read_text(encoding='utf-8')).get('train_seconds')
        yield StageRecord(stage, entry, seconds, tuple(_scalars(stage)))


def _scalars(stage: Path) -> list[dict[str, Any]]:
    """Log lines of the training by iteration; of a resumed stage the later file counts."""
    lines: dict[int, dict[str, Any]] = {}
    for path in sorted(stage.glob('*/vis_data/scalars.json')):
        for text in path.read_text(encoding='utf-8').splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut off by an interruption
                continue
            if 'loss' in line and 'iter' in line:
                lines[line['iter']] = line
    return [lines[iteration] for iteration in sorted(lines)]


def _flat_config(folder: Path) -> dict[str, Any]:
    path = folder / 'config.py'
    if not path.is_file():
        return {}
    return dotted_keys(Config.fromfile(path, import_custom_modules=False)._cfg_dict.to_dict())


def dotted_keys(value: Any, path: str = '') -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys; lists stay whole."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {
        key: item
        for name, part in value.items()
        for key, item in dotted_keys(part, f'{path}.{name}'.lstrip('.')).items()
    }


def config_differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The config values in which the runs differ.

    Returns:
        Dotted key to one value per run, ``'-'`` where a run has no such key. Where a run lives
        (``PLACE_KEYS``) is left out.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = {
        key: [run.config.get(key, '-') for run in runs] for key in keys if _tells(key.split('.')[0])
    }
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _tells(key: str) -> bool:
    return key not in PLACE_KEYS


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in one number alone (and in their seeds).

    Args:
        key: the config's key.
        points: (value, run) of every run, ordered by value.
    """

    key: str
    points: tuple[tuple[float, RunRecord], ...]

    @property
    def method(self) -> str:
        """The method of the runs; all have the same."""
        return self.points[0][1].results['method']

    @property
    def labels(self) -> list[str]:
        """The runs' labels, by value."""
        return [run.label for _, run in self.points]


def find_sweeps(runs: Sequence[RunRecord]) -> list[Sweep]:
    """All sweeps among the runs: one number takes two values or more, all else but the seed is equal."""
    groups: dict[tuple[str, str], list[tuple[float, RunRecord]]] = {}
    for key in config_differences(runs):
        if key == 'seed':
            continue
        for run in runs:
            value = run.config.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                rest = {
                    name: item
                    for name, item in run.config.items()
                    if name not in (key, 'seed') and _tells(name.split('.')[0])
                }
                group = (key, json.dumps(rest, sort_keys=True, default=str))
                groups.setdefault(group, []).append((float(value), run))
    return [
        Sweep(key, tuple(sorted(points, key=lambda point: point[0])))
        for (key, _), points in groups.items()
        if len({value for value, _ in points}) > 1
    ]

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A run from Python: train it, or open one that is there, and ask for its figures and models."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.config import Config
from mmengine.registry import RUNNERS
from torch import nn

from mmseg_sats.engine.command_line import run_config
from mmseg_sats.engine.export.stock import load_for_export
from mmseg_sats.utils.checkpoint import read_json
from mmseg_sats.visualization.report.run_record import RunRecord, load_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Run:
    """The figures and models of a run, read from what it wrote; :func:`train` and :func:`load_run` give one.

    Args:
        work_dir: the run's work dir, with at least one finished stage.

    Raises:
        FileNotFoundError: there is no results.json; the message names runs nearby.
        ValueError: a file is not what a run writes.
    """

    def __init__(self, work_dir: str | Path) -> None:
        self.work_dir = Path(work_dir)
        self._record: RunRecord = load_runs([self.work_dir])[0]

    def __repr__(self) -> str:
        final = ', '.join(f'{key} {"-" if value is None else f"{value:.2f}"}' for key, value in self.final.items())
        return f'Run({str(self.work_dir)!r}, {self._record.label}, {len(self.by_stage)} stages: {final})'

    @property
    def results(self) -> dict[str, Any]:
        """The contents of results.json."""
        return self._record.results

    @property
    def final(self) -> dict[str, float | None]:
        """mIoU of ``base``, ``new`` and ``all`` classes and ``hIoU`` after the last finished stage, in percent."""
        return dict(self.results['final'])

    @cached_property
    def by_stage(self) -> list[dict[str, Any]]:
        """A dict for each finished stage.

        ``stage``, ``new_classes``, ``images``, ``iou`` (percent by class), ``mIoU`` (of base, new and all),
        ``hIoU``, and ``seconds`` of training (None for a stage that was taken from a checkpoint).
        """
        return [
            dict(read_json(stage.folder / 'metrics.json')['results'], seconds=stage.seconds)
            for stage in self._record.stages
        ]

    @property
    def classes(self) -> list[str]:
        """Background and the classes that the last finished stage knows, by channel."""
        return self._record.class_names

    def stage_dir(self, stage: int = -1) -> Path:
        """The folder of a stage, by its number; -1 is the last that is finished.

        Raises:
            IndexError: the run has no such finished stage.
        """
        stages = self._record.stages
        if not -len(stages) <= stage < len(stages):
            raise IndexError(f'{self.work_dir} has no finished stage {stage}: expected 0 to {len(stages) - 1}')
        return stages[stage].folder

    def model(self, stage: int = -1, device: str = 'cpu') -> nn.Module:
        """The model that a stage left, in eval mode, as ``mmseg.apis.inference_model`` takes it.

        Args:
            stage: number of the stage; -1 is the last that is finished.
            device: where the model is put.

        Raises:
            IndexError: the run has no such finished stage.
        """
        return load_for_export(self.stage_dir(stage))[1].to(device)

    def plot(self) -> Figure:
        """The mIoU of all, base and new classes after each stage."""
        from mmseg_sats.visualization.report.curves import draw_curves  # imports matplotlib

        return draw_curves([self._record])


def load_run(work_dir: str | Path) -> Run:
    """Opens a run that has at least one finished stage, as :class:`Run` says."""
    return Run(work_dir)


def train(
    config: str | Path | Config,
    *,
    work_dir: str | Path | None = None,
    resume: bool = False,
    base: str | Path | None = None,
    amp: bool = False,
    **values: Any,
) -> Run:
    """Trains a method through all stages of its protocol, as ``mmseg-sats train`` does.

    Args:
        config: the config's file, the name of one that comes with the package, such as
            ``'sats/segformer_tiny_shapes_3-1'``, or an mmengine ``Config``.
        work_dir: where the run writes; by default ``work_dirs/METHOD/CONFIG``, as for the command.
        resume: whether to continue the run in the work dir.
        base: a checkpoint from which stage 0 is taken instead of training it.
        amp: mixed precision.
        **values: what ``--cfg-options`` sets: keys of the config. A dotted key is passed as
            ``**{'later_stages.lr': 1e-4}``; a dict is merged into the config's.

    Returns:
        The finished run.

    Raises:
        FileNotFoundError, ValueError, KeyError, TypeError, OSError: what is wrong with the config or the data,
            found before training; the message says what and where.
        WorkDirBusyError: another process is training in the work dir.
    """
    cfg = run_config(config, values, work_dir=work_dir, resume=resume, base=base, amp=amp)
    RUNNERS.build(cfg).train()
    return Run(cfg.work_dir)

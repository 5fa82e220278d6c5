# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A rehearsal before a run: what would fail only after hours of training fails in the first seconds."""

import errno
import re
import shutil
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, is_main_process
from mmengine.logging import MMLogger
from mmseg.registry import DATASETS, MODELS

from mmseg_sats.datasets.memory.replay_sampler import batch_split
from mmseg_sats.engine.checks.near_names import with_near_names
from mmseg_sats.engine.checks.no_trace import no_trace
from mmseg_sats.engine.checks.rehearsal_runner import RehearsalRunner, largest_and_smallest
from mmseg_sats.engine.checks.trial_build import trains_on_one_image
from mmseg_sats.engine.config.method_hooks import hook_class
from mmseg_sats.engine.evaluation import evaluation_set
from mmseg_sats.engine.files.snapshot import plain_meta, weights_of, write_weights
from mmseg_sats.engine.hooks.progress_hook import ProgressHook
from mmseg_sats.engine.training.stage_work import StageWork
from mmseg_sats.protocol import Stage
from mmseg_sats.utils.checkpoint import load_checkpoint_safely, write_text

FOLDER = '.rehearsal'
LOG = 'rehearsal.log'
# What libraries say of mistakes that people make, and what to change.
_ADVICE = (
    ('stack expects each tensor to be equal size|image size in a batch should be the same', 'expected '
     'test_dataloader.batch_size=1, or transforms that give all images one size'),
    ('None is not a callable object', 'expected an optimizer of torch as optim_wrapper.optimizer.type'),
    ('must contain the key "type"', 'expected the name of a hook or part that the config has, or a type'),
    ('out of memory', 'expected a smaller batch_size or crop_size, or mixed precision (--amp)'),
    ('must match the size of tensor', 'where the encoder takes images of one size only, expected '
     "model.test_cfg=dict(mode='slide', crop_size=..., stride=...) with that size"),
)  # fmt: skip


class RehearsalError(ValueError):
    """Raised if a stage of a run cannot be trained, evaluated or handed on to the next stage."""


class Rehearsal(StageWork):
    """The first, the second and the last stage of a run, in a folder of its own, with little of everything.

    Model, optimizer, hooks, loaders, transforms, metrics and files are the run's. The batches are smaller on a CPU.
    """

    runner_type = RehearsalRunner
    _images = 0

    def config(self, stage: Stage) -> Config:
        """The stage's config, shortened."""
        cfg = super().config(stage)
        on_cpu = not torch.cuda.is_available()
        # A GPU is fast enough for whole batches, and its memory is what they and the optimizer may not fit into. On a
        # CPU, the first stage's second iteration is what the run itself begins with.
        cfg.rehearsal = dict(iterations=1 if on_cpu and stage.index != 1 else 2)
        _shorten(cfg, cfg.rehearsal.iterations)
        if on_cpu and cfg.train_dataloader.get('batch_size'):
            cfg.train_dataloader.batch_size = _small_batch(cfg, self._fewest(cfg))
        # Of the stages between the second and the last, the rehearsal has the one before the last alone.
        old = cfg.model.get('old_model') or {}
        if 'earlier' in old:
            old.earlier = [own for own in old.earlier if Path(own.checkpoint).is_file()]
        # The text of this config is never read by anyone, so it is not laid out.
        return Config(cfg._cfg_dict.to_dict(), filename=cfg.filename, format_python_code=False)

    def _fewest(self, cfg: Config) -> int:
        """The smallest batch that the model can be trained with, which is asked once."""
        if not self._images:
            self._images = 1 if trains_on_one_image(cfg) else 2
        return self._images

    def run_all(self) -> None:
        """Runs the first, the second and the last stage.

        Raises:
            RehearsalError: a stage fails; the message names the stage and what it was doing.
        """
        stages = self.protocol.stages
        for stage in (*stages[:2], *stages[2:][-1:]):
            try:
                if stage.index > 2:
                    self.doing = 'handing the model on'
                    self._hand_on(stages[1], stages[stage.index - 1])
                self.run(stage)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise RehearsalError(self._message(stage, error)) from error

    def _hand_on(self, done: Stage, previous: Stage) -> None:
        """Makes what the stage before the last leaves from what the second stage has left."""
        source, target = self.folder(done.index), self.folder(previous.index)
        if is_main_process():
            shutil.copytree(source, target)
            cfg = self.config(previous)
            cfg.model.old_model.num_old = done.num_channels
            cfg.model.backbone.init_cfg = None
            model = MODELS.build(cfg.model)
            model.load_state_dict(load_checkpoint_safely(source / 'snapshot.pth')['state_dict'], strict=False)
            meta = dict(dataset_meta=plain_meta(evaluation_set(cfg).metainfo))
            write_weights(target / 'snapshot.pth', weights_of(model), meta)
        barrier()

    def _message(self, stage: Stage, error: Exception) -> str:
        advice = next((f'; {what}' for pattern, what in _ADVICE if re.search(pattern, str(error))), '')
        part = f', {error.part}' if hasattr(error, 'part') else ''
        where = f'stage {stage.index} would fail in {self.doing}{part}{self._pictures(stage)}'
        log = self.work_dir.parent / LOG
        what = f'{type(error).__name__}: {with_near_names(error)}{advice}'
        return f'{where}: {what} ({log} has the traceback; rehearsal=None starts without this rehearsal)'

    def _pictures(self, stage: Stage) -> str:
        if self.doing != 'evaluation':
            return ''
        with suppress(Exception):  # there is an error to tell of already
            dataset = DATASETS.build(self.config(stage).test_dataloader.dataset)
            paths = [dataset.get_data_info(place)['img_path'] for place in largest_and_smallest(dataset)]
            return f' ({" and ".join(paths)})'
        return ''


def rehearse(cfg: Config, work: StageWork, logger: MMLogger) -> None:
    """Rehearses a run in a folder within its work dir, which is removed again, and leaves no other trace.

    Args:
        cfg: the run's config.
        work: the run's stages.
        logger: told how long it took.

    Raises:
        RehearsalError: the run would fail. The traceback is in ``rehearsal.log`` in the work dir.
        OSError: the disk is full.
    """
    start = time.perf_counter()
    folder, log = work.work_dir / FOLDER, work.work_dir / LOG
    _clear(folder, log)
    barrier()
    own = Config(cfg._cfg_dict.to_dict(), filename=cfg.filename)
    own.resume = False
    trial = Rehearsal(own, work.protocol, folder, work.base, work.process_settings)
    try:
        with no_trace():
            trial.run_all()
    except RehearsalError:
        with suppress(OSError):
            write_text(log, traceback.format_exc())
        raise
    finally:
        _clear(folder)
    barrier()
    logger.info(
        f'rehearsal: the stages can be trained, evaluated and handed on ({time.perf_counter() - start:.1f} s; '
        'rehearsal=None leaves it out)'
    )


def _clear(folder: Path, *files: Path) -> None:
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
        for file in files:
            file.unlink(missing_ok=True)


def _shorten(cfg: Config, iterations: int) -> None:
    """Makes a stage's config one of some iterations, in place."""
    for limit, value in (('max_epochs', 1), ('max_iters', iterations), ('val_begin', 1), ('val_interval', 1)):
        if limit in cfg.train_cfg:
            cfg.train_cfg[limit] = value
    loader = cfg.train_dataloader
    loader.num_workers = min(1, loader.get('num_workers', 0))
    loader.pop('prefetch_factor', None)
    if not loader.num_workers:
        loader.persistent_workers = False
    wrapper = cfg.optim_wrapper
    if wrapper.get('accumulative_counts', 1) > iterations:
        wrapper.accumulative_counts = iterations
    cfg.pop('compile', None)  # it takes minutes and changes no result
    if cfg.get('visualizer'):
        cfg.visualizer.vis_backends = None
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if not _shows_progress(hook)]


def _small_batch(cfg: Config, fewest: int) -> int:
    """The smallest batch from ``fewest`` images on that has an image of every source of replay."""
    whole, share = cfg.train_dataloader.batch_size, cfg.get('replay_share', None)
    dataset = cfg.train_dataloader.dataset
    sources = sum(bool(dataset.get(name)) for name in ('exemplars', 'outside'))
    for size in range(fewest, whole):
        try:
            if share is not None and sources:
                batch_split(size, share, sources)
            return size
        except ValueError:
            continue
    return whole


def _shows_progress(hook: Any) -> bool:
    kind = hook_class(hook)
    return isinstance(kind, type) and issubclass(kind, ProgressHook)

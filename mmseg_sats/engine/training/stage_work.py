# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The work of a stage: it is trained, written, evaluated, and what the next one needs is kept."""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, is_main_process
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from mmseg.registry import DATASETS

from mmseg_sats.datasets import IncrementalDataset
from mmseg_sats.datasets.memory.replay import stage_dataset_cfg
from mmseg_sats.engine.config.replay import keep_exemplars
from mmseg_sats.engine.config.stage_config import build_stage_config, stage_dir
from mmseg_sats.engine.evaluation import evaluate_stage, evaluation_set
from mmseg_sats.engine.files.base import adopt_base
from mmseg_sats.engine.files.results import stage_results
from mmseg_sats.engine.files.snapshot import (
    is_whole,
    latest_checkpoint,
    load_snapshot,
    plain_meta,
    trained_weights,
    unwrap,
    weights_of,
    write_weights,
)
from mmseg_sats.engine.hooks.best_epoch_hook import BEST
from mmseg_sats.engine.training.distributed import share_work
from mmseg_sats.engine.training.stage_runner import StageRunner
from mmseg_sats.protocol import Protocol, Stage
from mmseg_sats.utils.checkpoint import load_checkpoint_safely, write_json, write_text

_SECONDS = 'train/time'  # mmengine's log of each iteration's seconds; a resumed stage continues it


class StageWork:
    """Runs the stages of a run, each with a new mmengine Runner.

    Args:
        cfg: the run's config.
        protocol: its protocol.
        work_dir: where the stages' folders are.
        base: the checkpoint that stage 0 is taken from, or None.
        process_settings: what a stage's config needs while it runs in the group of processes.

    Attributes:
        doing: what the stage is at, in words.
    """

    runner_type: type[StageRunner] = StageRunner

    def __init__(
        self,
        cfg: Config,
        protocol: Protocol,
        work_dir: Path,
        base: Path | None = None,
        process_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.cfg = cfg
        self.protocol = protocol
        self.work_dir = work_dir
        self.base = base
        self.process_settings = dict(process_settings or {})
        self.doing = ''

    def config(self, stage: Stage) -> Config:
        """The config of a stage."""
        return build_stage_config(self.cfg, self.protocol, stage, self.work_dir)

    def folder(self, index: int) -> Path:
        """The folder of stage ``index``."""
        return stage_dir(self.work_dir, index)

    def is_done(self, index: int) -> bool:
        """Whether stage ``index`` is finished."""
        return (self.folder(index) / 'done').exists()

    def run(self, stage: Stage) -> None:
        """Runs a stage, or what is left of it where the run is resumed."""
        folder = self.folder(stage.index)
        self.doing = 'its config'
        cfg = self.config(stage)
        if is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / 'config.py', cfg.pretty_text)
        barrier()
        snapshot = folder / 'snapshot.pth'
        checkpoint = latest_checkpoint(folder) if self.cfg.get('resume') else None
        start_from = cfg.load_from
        if checkpoint is not None:
            # mmengine resumes the optimizer, schedulers and counters from the checkpoint.
            cfg.resume, cfg.load_from = True, str(checkpoint)
        cfg.merge_from_dict(self.process_settings)
        share_work(cfg)
        self.doing = 'building model and hooks'
        runner = self.runner_type.from_cfg(cfg)
        runner.stage, runner.start_from = stage, start_from
        runner.logger.info(
            f'stage {stage.index} of {len(self.protocol.stages)}: {len(stage.old)} old classes, '
            f'{len(stage.new)} new'
        )
        self.doing = 'training'
        images = self._make_snapshot(runner, snapshot)
        seconds = _train_seconds(runner, checkpoint)
        self.doing = 'reading the snapshot'
        load_snapshot(runner.model, snapshot)
        self.doing = 'evaluation'
        # Runner.test calls it too: hooks open their files, and EMA starts from the weights just loaded.
        runner.call_hook('before_run')
        metrics = evaluate_stage(runner, may_be_empty=self._from_base(stage.index))
        self.doing = 'the choice of exemplars'
        keep_exemplars(runner.cfg, stage, folder, self.folder(stage.index - 1))
        self.doing = 'the end of the stage'
        if is_main_process():
            classes = evaluation_set(cfg).metainfo['classes']
            result = stage_results(
                stage.index, classes[len(classes) - len(stage.new) :], images, metrics, classes
            )
            if images is not None and (names := _classes_without_images(cfg)):
                result['without_images'] = names
            write_json(folder / 'metrics.json', dict(results=result, train_seconds=seconds))
        barrier()
        runner.call_hook('after_stage', stage=stage, metrics=metrics)
        if is_main_process():
            write_text(folder / 'done', '')
        barrier()
        _release(runner)

    def _make_snapshot(self, runner: StageRunner, path: Path) -> int | None:
        """Trains the stage, or takes stage 0 from ``base``; returns the number of training images."""
        from_base = self._from_base(runner.stage.index)
        if from_base:
            images = None
        else:
            # Only the stage's own images are counted, not the replayed ones.
            cfg = stage_dataset_cfg(runner.cfg.train_dataloader.dataset)
            images = len(DATASETS.build(cfg))
        if self.cfg.get('resume') and is_whole(path):
            runner.start()
            return images  # the run was stopped after the snapshot, before its evaluation
        model = unwrap(runner.model)
        if from_base:
            meta = dict(dataset_meta=plain_meta(evaluation_set(runner.cfg).metainfo))
            classes = meta['dataset_meta']['classes']
            model.load_state_dict(adopt_base(model, self.base, classes))
            runner.call_hook('before_stage', stage=runner.stage)
        else:
            runner.train()
            best = path.with_name(BEST)
            kept = load_checkpoint_safely(best) if best.exists() else trained_weights(runner)
            model.load_state_dict(kept['state_dict'])
            meta = kept['meta']
        runner.call_hook('before_snapshot', stage=runner.stage)
        if is_main_process():
            write_weights(path, weights_of(model), meta)
        barrier()
        return images

    def _from_base(self, index: int) -> bool:
        return self.base is not None and index == 0


def _classes_without_images(cfg: Config) -> list[str]:
    """Names of the classes that a stage learns without a training image that shows them."""
    dataset = DATASETS.build(stage_dataset_cfg(cfg.train_dataloader.dataset))
    if not isinstance(dataset, IncrementalDataset):
        return []
    absent = dataset.shown().absent(dataset.protocol)
    return [dataset.class_names[class_id] for index, class_id in absent if index == dataset.stage.index]


def _train_seconds(runner: Runner, checkpoint: Path | None) -> float:
    """Seconds of all training iterations of the stage, including those before it was resumed.

    Args:
        runner: the stage's runner.
        checkpoint: what the stage was resumed from, if it was. The times are read from it when there
            was nothing left to train.
    """
    scalars = runner.message_hub.log_scalars
    if _SECONDS not in scalars and checkpoint is not None:
        scalars = load_checkpoint_safely(checkpoint)['message_hub']['log_scalars']
    return float(scalars[_SECONDS].data[0].sum()) if _SECONDS in scalars else 0.0


def _release(runner: Runner) -> None:
    """Frees what a finished stage holds: its workers, model, log files and mmengine's global instances."""
    for handler in list(runner.logger.handlers):
        handler.close()
    for instance in (runner.logger, runner.message_hub, runner.visualizer, runner.default_scope):
        # A visualizer is registered twice, by mmseg's class and by mmengine's.
        for manager in type(instance).__mro__:
            instances = vars(manager).get('_instance_dict', {})
            # The last one is kept, because mmengine needs a current logger.
            if len(instances) > 1 or isinstance(instance, Visualizer):
                instances.pop(instance.instance_name, None)
    runner.__dict__.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

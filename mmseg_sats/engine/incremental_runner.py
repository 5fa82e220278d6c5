# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The runner of all stages of a run; each stage is run by an ordinary mmengine Runner."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, is_main_process
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from mmseg.registry import DATASETS

from mmseg_sats.datasets.memory.replay import stage_dataset_cfg
from mmseg_sats.engine.checks.preflight import check_base, check_config, check_data
from mmseg_sats.engine.checks.trial_build import check_evaluator, check_model, check_training
from mmseg_sats.engine.config.class_objects import name_classes
from mmseg_sats.engine.config.config_text import config_text
from mmseg_sats.engine.config.defaults import set_defaults
from mmseg_sats.engine.config.own_scope import drop_own_scope
from mmseg_sats.engine.config.replay import check_outside_folder, check_replay, keep_exemplars
from mmseg_sats.engine.config.stage_config import (
    build_stage_config,
    check_pretrained,
    stage_dir,
)
from mmseg_sats.engine.config.stage_length import notes_on_length
from mmseg_sats.engine.config.trained_model import note_on_sizes
from mmseg_sats.engine.evaluation import evaluate_stage, evaluation_set
from mmseg_sats.engine.files.results import (
    comparison_table,
    forgetting_table,
    run_results,
    stage_results,
    stage_table,
    write_results,
)
from mmseg_sats.engine.files.snapshot import (
    adopt_base,
    head_names,
    is_whole,
    latest_checkpoint,
    load_snapshot,
    plain_meta,
    trained_weights,
    unwrap,
    weights_of,
    write_weights,
)
from mmseg_sats.engine.files.work_dir import (
    check_own_config,
    check_same_run,
    check_unused,
    check_writable,
    locked,
)
from mmseg_sats.engine.hooks.best_epoch_hook import BEST
from mmseg_sats.engine.run_plan import build_protocol
from mmseg_sats.engine.run_report import check_report, report_at_end
from mmseg_sats.engine.training.distributed import check_shared, join_process_group, share_work
from mmseg_sats.engine.training.stage_runner import StageRunner
from mmseg_sats.protocol import Stage
from mmseg_sats.utils.checkpoint import (
    load_checkpoint_safely,
    read_json,
    remove_temporary,
    write_json,
    write_text,
)
from mmseg_sats.utils.config_keys import IDENTITY
from mmseg_sats.utils.shared_values import Sharing
from mmseg_sats.utils.user_modules import import_custom

_SECONDS = 'train/time'  # mmengine's log of each iteration's seconds; a resumed stage continues it


@RUNNERS.register_module()
class IncrementalRunner:
    """Runs a config through all stages of its protocol.

    For each stage it writes a config (``stage_k/config.py``), trains with a new mmengine Runner, saves
    and evaluates a snapshot, and at the end writes a file ``done``. Besides mmengine's methods, hooks
    may define three more: ``before_stage(runner, stage)`` is called when the weights that the stage
    starts from are loaded, ``before_snapshot(runner, stage)`` when the weights that will be saved are
    loaded (it may change them), and ``after_stage(runner, stage, metrics)`` when all files are written.

    Args:
        cfg: the run's config. Beside mmseg's keys it has ``protocol``, and may have ``work_dir``, ``split``,
            ``class_order``, ``setting``, ``initial_stage``, ``later_stages`` (see ``stage_config``),
            ``base`` (a checkpoint from which stage 0 is taken), ``resume`` and ``report`` (a dict of the
            report's options, or None for no report).

    Raises:
        ValueError: the protocol, the memory or a number is impossible, the work dir is in use (and
            ``resume`` is not set or the config is not that of its run), the data do not fit, or a stage
            has no images.
        KeyError: the config uses a variable that it does not define, or has a misspelt key.
        FileNotFoundError: ``base``, a list, an image or a mask does not exist.
        OSError: the work dir cannot be written to.
    """

    def __init__(self, cfg: Config) -> None:
        self.cfg = copy.deepcopy(cfg)
        name_classes(self.cfg)
        drop_own_scope(self.cfg)
        import_custom(self.cfg)
        set_defaults(self.cfg)
        self.work_dir = Path(self.cfg.work_dir)
        self.base = Path(cfg.base) if cfg.get('base') else None
        init_default_scope(cfg.get('default_scope', 'mmseg'))
        check_config(self.cfg)
        name = f'IncrementalRunner of {self.work_dir.resolve()}'
        self.logger = MMLogger.get_instance(name, log_level=cfg.get('log_level', 'INFO'))
        self.protocol = build_protocol(self.cfg)
        check_replay(self.cfg, self.protocol)
        check_report(self.cfg.get('report'))
        check_writable(self.work_dir)
        check_own_config(self.work_dir, cfg.filename)
        if self.cfg.get('resume'):
            check_same_run(self.work_dir, self.cfg)
        else:
            check_unused(self.work_dir)
        # All stages' configs are built now, so that an undefined variable is found before any training.
        stages = [self._stage_config(stage) for stage in self.protocol.stages]
        if note := note_on_sizes(stages[-1]):
            self.logger.warning(note)
        for note in notes_on_length(self.cfg, stages):
            self.logger.info(note)
        check_outside_folder(stages[-1])
        check_training(stages[-1], check_model(stages[-1]))
        check_evaluator(stages[-1])
        if not (stage_dir(self.work_dir, 0) / 'done').exists():
            if self.base is None:
                check_pretrained(stages[0])
            else:
                check_base(stages[0], self.base)
        self._process_settings = join_process_group(self.cfg)
        self._sharing = Sharing()
        with self._sharing:
            # If stage 0 is taken from a checkpoint, its data may not be available.
            check_data(stages, first=min(1, len(stages) - 1) if self.base else 0)

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'IncrementalRunner':
        """Called by mmengine's ``RUNNERS.build(cfg)``."""
        return cls(cfg)

    def train(self) -> dict[str, Any]:
        """Runs every stage that is not finished yet.

        Returns:
            The contents of results.json.

        Raises:
            WorkDirBusyError: another process is training in the work dir.
        """
        if is_main_process():
            self.work_dir.mkdir(parents=True, exist_ok=True)
        with locked(self.work_dir) if is_main_process() else nullcontext():
            return self._train()

    def _train(self) -> dict[str, Any]:
        if self.cfg.get('resume') and not (self.work_dir / 'config.py').exists():
            self.logger.warning(f'nothing to resume in {self.work_dir}: starting from stage 0')
        if is_main_process():
            remove_temporary(self.work_dir)
            write_text(self.work_dir / 'config.py', config_text(self.cfg))
        check_shared(self.work_dir)
        with self._sharing, _old_objects_left_alone():
            results = self._run_stages()
        self._sharing.forget()
        if is_main_process():
            tables = f'{stage_table(results)}\n{forgetting_table(results)}\n{comparison_table([results])}'
            self.logger.info(f'{self.cfg.method} {self.cfg.protocol}:\n{tables}')
            report_at_end(self.work_dir, self.cfg.get('report'))
            pictures = '' if self.cfg.get('report') is None else ', curves and pictures in report/index.html beside it'
            self.logger.info(f'results are in {self.work_dir}/results.json{pictures}')
        return results

    def _run_stages(self) -> dict[str, Any]:
        finished: list[dict[str, Any]] = []
        results: dict[str, Any] = {}
        for stage in self.protocol.stages:
            folder = stage_dir(self.work_dir, stage.index)
            done = _is_done(folder)
            if not done:
                self._run_stage(stage, folder)
            finished.append(read_json(folder / 'metrics.json')['results'])
            # Results are written after each stage; of stages finished by an earlier process, only after the last.
            if not done or not _is_done(stage_dir(self.work_dir, stage.index + 1)):
                results = self._report(finished)
        return results

    def _run_stage(self, stage: Stage, folder: Path) -> None:
        cfg = self._stage_config(stage)
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
        cfg.merge_from_dict(self._process_settings)
        share_work(cfg)
        runner = StageRunner.from_cfg(cfg)
        runner.stage, runner.start_from = stage, start_from
        runner.logger.info(
            f'stage {stage.index} of {len(self.protocol.stages)}: {len(stage.old)} old classes, '
            f'{len(stage.new)} new'
        )
        images = self._make_snapshot(runner, snapshot)
        seconds = _train_seconds(runner, checkpoint)
        load_snapshot(runner.model, snapshot)
        # Runner.test calls it too: hooks open their files, and EMA starts from the weights just loaded.
        runner.call_hook('before_run')
        metrics = evaluate_stage(runner, may_be_empty=self._from_base(stage.index))
        keep_exemplars(runner.cfg, stage, folder, stage_dir(self.work_dir, stage.index - 1))
        if is_main_process():
            classes = evaluation_set(cfg).metainfo['classes']
            result = stage_results(
                stage.index, classes[len(classes) - len(stage.new) :], images, metrics, classes
            )
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
            model.load_state_dict(adopt_base(model, head_names(model), self.base, classes))
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

    def _report(self, finished: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes the results so far and returns them."""
        results = run_results(self._identity(), finished)
        if is_main_process():
            write_results(self.work_dir, results)
        return results

    def _stage_config(self, stage: Stage) -> Config:
        return build_stage_config(self.cfg, self.protocol, stage, self.work_dir)

    def _identity(self) -> dict[str, Any]:
        """The values that identify the run, which stand at the beginning of results.json."""
        identity = {
            key: self.cfg.get(key) for key in IDENTITY if key != 'split' or self.cfg.get('split')
        }
        return identity | dict(class_order=list(self.protocol.class_order))


def _is_done(folder: Path) -> bool:
    return (folder / 'done').exists()


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Makes Python's garbage collector skip the objects that existed before the run (mostly the libraries')."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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

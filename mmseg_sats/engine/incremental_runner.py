# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The runner of all stages of a run; each stage is run by an ordinary mmengine Runner."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS, init_default_scope

from mmseg_sats.engine.checks.data import check_data
from mmseg_sats.engine.checks.preflight import check_base, check_config
from mmseg_sats.engine.checks.rehearsal import rehearse
from mmseg_sats.engine.checks.trial_build import check_evaluator, check_model
from mmseg_sats.engine.checks.values import check_length, check_values
from mmseg_sats.engine.config.class_objects import name_classes
from mmseg_sats.engine.config.config_text import config_text
from mmseg_sats.engine.config.defaults import set_defaults
from mmseg_sats.engine.config.own_scope import drop_own_scope
from mmseg_sats.engine.config.replay import check_outside_folder, check_replay
from mmseg_sats.engine.config.stage_config import check_pretrained
from mmseg_sats.engine.config.stage_length import notes_on_length
from mmseg_sats.engine.config.trained_model import note_on_sizes
from mmseg_sats.engine.files.results import (
    comparison_table,
    forgetting_table,
    run_results,
    stage_table,
    write_results,
)
from mmseg_sats.engine.files.run_report import check_report, report_at_end
from mmseg_sats.engine.files.work_dir import (
    check_own_config,
    check_same_run,
    check_unused,
    holds,
    locked,
)
from mmseg_sats.engine.hooks.atomic_checkpoint_hook import note_on_checkpoints
from mmseg_sats.engine.run_plan import build_protocol
from mmseg_sats.engine.training.distributed import check_shared, join_process_group
from mmseg_sats.engine.training.stage_work import StageWork
from mmseg_sats.utils.checkpoint import read_json, remove_temporary, write_text
from mmseg_sats.utils.config_keys import IDENTITY
from mmseg_sats.utils.shared_values import Sharing
from mmseg_sats.utils.user_modules import import_custom
from mmseg_sats.utils.writable import check_writable


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
            report's options, or None for no report), and ``rehearsal`` (None leaves it out).

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
        check_writable(self.work_dir, f'work dir {self.work_dir}')
        check_own_config(self.work_dir, cfg.filename)
        if not self.cfg.get('resume'):
            check_unused(self.work_dir)
        # All stages' configs are built now, so that an undefined variable is found before any training.
        work = StageWork(self.cfg, self.protocol, self.work_dir, self.base)
        stages = [work.config(stage) for stage in self.protocol.stages]
        if self.cfg.get('resume') and (note := check_same_run(self.work_dir, self.cfg, stages[-1])):
            self.logger.warning(note)
        for note in filter(None, (note_on_sizes(stages[-1]), note_on_checkpoints(stages[-1]))):
            self.logger.warning(note)
        for note in notes_on_length(self.cfg, stages):
            self.logger.info(note)
        check_outside_folder(stages[-1])
        check_length(stages[-1])
        check_values(stages[-1])
        check_model(stages[-1])
        check_evaluator(stages[-1])
        if not work.is_done(0):
            if self.base is None:
                check_pretrained(stages[0])
            else:
                check_base(stages[0], self.base)
        work.process_settings = join_process_group(self.cfg)
        self._work = work
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
        kept = self.work_dir / 'config.py'
        if self.cfg.get('resume') and not kept.exists():
            self.logger.warning(f'nothing to resume in {self.work_dir}: starting from stage 0')
        check_shared(self.work_dir)
        with self._sharing, _old_objects_left_alone():
            if self.cfg.get('rehearsal', {}) is not None and not holds(kept, self.cfg):
                rehearse(self.cfg, self._work, self.logger)
            if is_main_process():
                remove_temporary(self.work_dir)
                write_text(kept, config_text(self.cfg))
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
            done = self._work.is_done(stage.index)
            if not done:
                self._work.run(stage)
            finished.append(read_json(self._work.folder(stage.index) / 'metrics.json')['results'])
            # Results are written after each stage; of stages finished by an earlier process, only after the last.
            if not done or not self._work.is_done(stage.index + 1):
                results = self._report(finished)
        return results

    def _report(self, finished: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes the results so far and returns them."""
        results = run_results(self._identity(), finished)
        if is_main_process():
            write_results(self.work_dir, results)
        return results

    def _identity(self) -> dict[str, Any]:
        """The values that identify the run, which stand at the beginning of results.json."""
        identity = {
            key: self.cfg.get(key) for key in IDENTITY if key != 'split' or self.cfg.get('split')
        }
        return identity | dict(class_order=list(self.protocol.class_order))


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Makes Python's garbage collector skip the objects that existed before the run (mostly the libraries')."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

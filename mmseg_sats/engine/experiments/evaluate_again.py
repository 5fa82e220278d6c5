# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Evaluating a stage of a finished run again, from its snapshot, with other options if wanted."""

import inspect
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmseg_sats.engine.command_line import read_config
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.evaluation import evaluate_stage, evaluation_set
from mmseg_sats.engine.files.results import stage_results
from mmseg_sats.engine.files.snapshot import check_classes, load_snapshot
from mmseg_sats.engine.run_plan import build_protocol
from mmseg_sats.engine.training.stage_runner import StageRunner
from mmseg_sats.utils.checkpoint import load_checkpoint_safely


def stage_config(folder: Path, options: dict) -> Config:
    """The config of a stage, made anew with the options.

    Options for keys such as ``data_root`` or ``eval_pipeline`` are applied to the run's ``config.py``,
    since the stage's own has their values already filled in. Options for parts of the stage, such as
    ``test_dataloader.batch_size``, are applied to the stage's config.
    """
    parts = {
        key: value
        for key, value in options.items()
        if '.' in key and key.split('.')[0] in inspect.signature(Runner).parameters
    }
    words = {key: value for key, value in options.items() if key not in parts}
    path = folder.parent / 'config.py'
    if not path.is_file():
        if words:
            raise FileNotFoundError(
                f'{path} does not exist: {", ".join(words)} can be changed in the config of the run '
                f'alone, in {folder / "config.py"} they are resolved'
            )
        return read_config(folder / 'config.py', parts)
    cfg = read_config(path, words)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    protocol = build_protocol(cfg, 'test_dataloader')  # the training data may not be here
    stage = protocol.stage(int(folder.name.removeprefix('stage_')))
    cfg = build_stage_config(cfg, protocol, stage, folder.parent)
    cfg.merge_from_dict(parts)
    return cfg


def evaluate_again(folder: Path, out: Path, options: dict | None, on: Path | None = None) -> dict:
    """Evaluates a snapshot.

    Args:
        folder: the stage's, with the snapshot in it.
        out: where logs go.
        options: see :func:`stage_config`.
        on: the folder of a later stage of the run, with whose images and classes the snapshot is evaluated. It has
            nothing of the classes that it has not learned.

    Returns:
        The entry in results.json, of stage ``on`` if there is one.

    Raises:
        FileNotFoundError: a file of the run, or data are missing.
        ValueError: the snapshot was trained on other classes.
    """
    cfg = stage_config(folder, options or {})
    if on is not None:
        later = stage_config(on, options or {})
        cfg.test_dataloader, cfg.test_evaluator = later.test_dataloader, later.test_evaluator
    cfg.work_dir = str(out / folder.name)
    # Nothing is trained: the old model and the snapshot it starts from may be gone.
    cfg.load_from, cfg.model.old_model = None, None
    dataset = evaluation_set(cfg)
    classes = dataset.metainfo['classes']
    trained = load_checkpoint_safely(folder / 'snapshot.pth')['meta']['dataset_meta']['classes']
    check_classes(folder, trained, classes if on is None else classes[: len(trained)])
    runner = StageRunner.from_cfg(cfg)
    load_snapshot(runner.model, folder / 'snapshot.pth')
    runner.call_hook('before_run')
    # A stage 0 that came from a checkpoint may have no images.
    metrics = evaluate_stage(runner, may_be_empty=folder.name == 'stage_0' and on is None)
    new = classes[len(classes) - len(dataset.stage.new) :]
    return stage_results(dataset.stage.index, new, None, metrics, classes)

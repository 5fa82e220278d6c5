# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""How long a stage is trained, in epochs or in iterations, and what else of its config is counted in the same unit.

A config says it by the words ``epochs`` and ``iters``, or by ``max_epochs`` and ``max_iters`` of its ``train_cfg``,
as mmseg's own schedules do. ``iters`` counts over ``train_cfg.max_iters``, and that over ``epochs``; what a part for
some stages or an option says counts over what the config says, whichever unit it is in.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config

from mmseg_sats.engine.config.variables import config_variables, resolve_variables

LOOP = 'ResumableTrainLoop'
# mmengine's loops, which the one above replaces: it alone resumes at every iteration.
_STOCK = ('EpochBasedTrainLoop', 'IterBasedTrainLoop')
# Of train_cfg, counted in its unit.
_COUNTED = ('val_begin', 'val_interval', 'dynamic_intervals')
# Of a schedule, what may be the length of the stage.
_ENDS = ('end', 'T_max', 'total_steps')
EPOCHS, ITERS = '$epochs', '$iters'


def prefer_length(cfg: Config, said: Mapping[str, Any]) -> None:
    """Makes what is about to be merged into a config decide in which unit its stages are counted.

    Args:
        cfg: a config, its variables not resolved; changed in place.
        said: what will be merged in, with dotted keys or nested.
    """
    words = {**said, **{f'train_cfg.{key}': value for key, value in (said.get('train_cfg') or {}).items()}}
    if words.get('iters') is not None:
        return
    if words.get('train_cfg.max_iters') is not None:
        if cfg.get('iters') is not None:
            cfg.iters = None
    elif words.get('epochs') is not None or words.get('train_cfg.max_epochs') is not None:
        _count_epochs(cfg)


def set_length(cfg: Config) -> None:
    """Sets a stage's training loop, and what is counted with it, in place.

    mmengine's own loops are replaced by ``ResumableTrainLoop``, and ``InfiniteSampler`` by endless batches that are
    the same after a resume. With iterations, schedules that end with the stage do so by iteration, and logs and
    checkpoints are written by iteration. A loop of the user's own is left alone.

    Args:
        cfg: the stage's config, the parts for its stage merged in, its variables not resolved.

    Raises:
        KeyError: ``iters`` uses a variable that is not defined.
        ValueError: a schedule begins at an epoch and ends with the iterations of the stage, or the other way round.
    """
    loop = cfg.get('train_cfg')
    if not loop or not _is_known(loop):
        return
    if cfg.get('iters') is None and loop.get('max_iters') not in (None, ITERS):
        cfg.iters = loop.max_iters
    if cfg.get('iters') is None:
        _count_epochs(cfg)
    else:
        cfg.iters = resolve_variables(cfg.iters, config_variables(cfg), 'iters')
        _count_iterations(cfg, cfg.iters)
    loop = cfg.train_cfg
    for key in ('by_epoch', 'fast_forward_on_resume'):
        loop.pop(key, None)
    loop.type = LOOP
    if not cfg.get('val_dataloader') and not cfg.get('val_evaluator'):
        cfg.pop('val_cfg', None)  # mmseg's schedules have one, and mmengine wants all three or none
    _set_sampler(cfg)


def _is_known(loop: Mapping[str, Any]) -> bool:
    return _kind(loop) in (None, LOOP, *_STOCK)


def _kind(part: Mapping[str, Any]) -> Any:
    """A type without the registry or module that it is looked up in."""
    kind = part.get('type')
    return kind.rpartition('.')[-1] if isinstance(kind, str) else kind


def _count_epochs(cfg: Config) -> None:
    loop = cfg.get('train_cfg')
    if not loop or not _is_known(loop):
        return
    if cfg.get('iters') is not None:
        cfg.iters = None
    if (iters := loop.pop('max_iters', None)) is not None:
        for key in _COUNTED:
            loop.pop(key, None)
        for name, scheduler in _schedulers(cfg):
            _retime(name, scheduler, [iters], EPOCHS)
        loop.setdefault('max_epochs', EPOCHS)


def _count_iterations(cfg: Config, iters: int) -> None:
    loop = cfg.train_cfg
    given, epochs = loop.get('max_iters'), loop.pop('max_epochs', None)
    if given is None:
        for key in _COUNTED:
            loop.pop(key, None)
    elif isinstance(given, int):
        # A schedule that is made shorter or longer is validated as often as before.
        loop.update({key: max(1, loop[key] * iters // given) for key in _COUNTED[:2] if key in loop})
    loop.max_iters = ITERS
    for name, scheduler in _schedulers(cfg):
        _retime(name, scheduler, [epochs, given], ITERS)
    cfg.log_processor = dict(cfg.get('log_processor') or {}, by_epoch=False)
    hooks = cfg.get('default_hooks') or {}
    if logger := hooks.get('logger'):
        logger.log_metric_by_epoch = False
        logger.interval = min(logger.get('interval', 10), iters)
    checkpoint = hooks.get('checkpoint') or {}
    # By default after every epoch: of passes over few images there may be thousands.
    if _kind(checkpoint) == 'AtomicCheckpointHook' and 'by_epoch' not in checkpoint and checkpoint.get('interval') == 1:
        checkpoint.update(by_epoch=False, interval=max(1, iters // 10))


def _schedulers(cfg: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    given = cfg.get('param_scheduler') or []
    for index, scheduler in enumerate(given if isinstance(given, list | tuple) else [given]):
        if isinstance(scheduler, dict) and 'type' in scheduler:
            yield f'param_scheduler[{index}]', scheduler


def _retime(name: str, scheduler: dict[str, Any], ends: list[Any], end: str) -> None:
    """Makes a schedule that ends with the stage count in the stage's unit.

    Args:
        name: its place in the config, for messages.
        scheduler: its config, changed in place.
        ends: numbers that mean the end of the stage, beside the two variables.
        end: what means it now, ``EPOCHS`` or ``ITERS``.
    """
    found = [
        key for key, value in scheduler.items()
        if value in (EPOCHS, ITERS) or (key in _ENDS and value is not None and value in ends)
    ]  # fmt: skip
    if not found:
        return
    by_epoch = end == EPOCHS
    if scheduler.get('by_epoch', True) is not by_epoch:
        if scheduler.get('begin', 0):
            units = ('an iteration', 'epochs') if by_epoch else ('an epoch', 'iterations')
            raise ValueError(
                f'{name} begins at {units[0]} ({scheduler["begin"]}) and ends with the stage, which is counted in '
                f'{units[1]}: expected a begin in {units[1]} and by_epoch={by_epoch}'
            )
        scheduler['by_epoch'] = by_epoch
        scheduler.pop('convert_to_iter_based', None)
        if by_epoch:
            scheduler['convert_to_iter_based'] = True
    scheduler.update(dict.fromkeys(found, end))


def _set_sampler(cfg: Config) -> None:
    loader = cfg.get('train_dataloader') or {}
    sampler = loader.get('sampler') or {}
    if _kind(sampler) == 'InfiniteSampler' and not loader.get('batch_sampler'):
        sampler.type = 'DefaultSampler'
        loader.pop('drop_last', None)  # every batch is full
        loader.batch_sampler = dict(type='SharedBatchSampler', endless=True)


def _late_schedules(stage: Config) -> Iterator[tuple[str, int, int]]:
    """Of each schedule that ends behind the stage: its name, its end, and the stage's iterations."""
    iters = (stage.get('train_cfg') or {}).get('max_iters')
    for name, scheduler in _schedulers(stage):
        end = scheduler.get('end')
        if iters and scheduler.get('by_epoch', True) is False and isinstance(end, int) and end > iters:
            yield name, end, iters


def notes_on_length(cfg: Config, stages: Sequence[Config]) -> Iterator[str]:
    """Tells what a run takes from its config in another way than the config says.

    Args:
        cfg: the run's config.
        stages: the configs of its stages.
    """
    loop = cfg.get('train_cfg') or {}
    if _kind(loop) in _STOCK:
        yield f'train_cfg.type={loop.type}: {LOOP} is used, which alone resumes at every iteration with the same result'
    if _kind((cfg.get('train_dataloader') or {}).get('sampler') or {}) == 'InfiniteSampler':
        yield 'InfiniteSampler: SharedBatchSampler composes the same kind of batches, which a resumed run has again'
    if cfg.get('iters') is not None and cfg.get('epochs') is not None:
        yield f'iters={cfg.iters} is used, epochs={cfg.epochs} is not'
    late = dict.fromkeys((name, end, iters) for stage in stages for name, end, iters in _late_schedules(stage))
    for name, end, iters in late:
        yield (
            f'{name} ends at iteration {end}, a stage at {iters}: the learning rate does not come to its end; '
            f"'{ITERS}' is the stage's last iteration"
        )
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    rate = optimizer.get('lr') if isinstance(optimizer, dict) else None
    if isinstance(rate, int | float) and any('lr' in (part or {}) for part in (cfg, cfg.get('later_stages'))):
        yield (
            f'optim_wrapper.optimizer.lr={rate} is used, lr and later_stages.lr are not: expected '
            "optim_wrapper.optimizer.lr='$lr' where they should be"
        )

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A stage's runner that does little of everything, for the rehearsal of a run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmseg.registry import DATASETS
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from mmseg_sats.datasets.checks.image_sizes import size_of
from mmseg_sats.engine.hooks.atomic_checkpoint_hook import PATTERNS
from mmseg_sats.engine.training.stage_runner import StageRunner
from mmseg_sats.utils.spelling import near_match, one_slip

# What mmengine's runner is asked to call beside its own moments.
STAGE_MOMENTS = ('before_stage', 'before_snapshot', 'after_stage')


class _Enough(Exception):  # noqa: N818 - the rehearsal of a stage's training has ended as it should
    pass


class _StopAtEnough(Hook):
    """Ends training after some iterations."""

    priority = 'LOWEST'

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Raises ``_Enough`` behind the last of the iterations, unless the stage ends there by itself."""
        if self.iterations <= runner.iter + 1 < runner.max_iters:
            raise _Enough


class _AskSchedules(Hook):
    """Gives the numbers of the validation to schedules that follow them, which may end before they get any."""

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Raises KeyError if a schedule follows a number that the validation does not give."""
        schedules = runner.param_schedulers or []
        for one in schedules if isinstance(schedules, list) else chain(*schedules.values()):
            monitor = getattr(one, 'monitor', None)
            if metrics and getattr(one, 'need_val_args', False) and monitor not in metrics:
                with _part('param_scheduler'):
                    raise KeyError(
                        f'{type(one).__name__}: the validation gives no {monitor!r}{near_match(monitor, metrics)}; '
                        f'expected one of {", ".join(metrics)} as monitor'
                    )


@contextmanager
def _part(name: str) -> Iterator[None]:
    """Tells an error which part of the config it comes from."""
    try:
        yield
    except Exception as error:
        error.part = name
        raise


def check_moments(hook: type) -> None:
    """Refuses a hook with a method of nearly the name that is called at the border of a stage.

    Raises:
        ValueError: the method, and the name that it is near to.
    """
    for name in dir(hook):
        if name not in STAGE_MOMENTS and any(one_slip(name, moment) for moment in STAGE_MOMENTS):
            raise ValueError(f'{hook.__name__}.{name} is called by nothing{near_match(name, STAGE_MOMENTS)}')


class _Picked(Sampler):
    """A sampler of the given images alone, on every process."""

    def __init__(self, dataset: Dataset, picks: Sequence[int], seed: int | None = None) -> None:
        self.picks = picks

    def __iter__(self) -> Iterator[int]:
        return iter(self.picks)

    def __len__(self) -> int:
        return len(self.picks)

    def set_epoch(self, epoch: int) -> None:
        """Nothing depends on the epoch."""


class RehearsalRunner(StageRunner):
    """A stage's runner that trains one or two iterations; other passes see only the largest and the smallest image.

    How many is ``rehearsal.iterations`` of the stage's config.

    What it logs goes to the log file alone.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_hook(_StopAtEnough(self.cfg.rehearsal.iterations))
        self.register_hook(_AskSchedules())

    def register_hook(self, hook: Hook | dict[str, Any], priority: Any = None) -> None:
        """mmengine's, which refuses a method of nearly the name that is called at the border of a stage."""
        with _part('a hook'):
            super().register_hook(hook, priority)
            for kind in {type(one) for one in self.hooks}:
                check_moments(kind)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """mmengine's."""
        with _part('optim_wrapper'):
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """mmengine's."""
        with _part('param_scheduler'):
            return super().build_param_scheduler(scheduler)

    def build_logger(self, *args: Any, **options: Any) -> MMLogger:
        """The stage's logger without the screen."""
        logger = super().build_logger(*args, **options)
        logger.handlers = [handler for handler in logger.handlers if hasattr(handler, 'baseFilename')]
        return logger

    def train(self) -> nn.Module:
        """Trains the iterations, ends the epoch, and goes on from the checkpoint that was written, if one was."""
        try:
            super().train()
        except _Enough:
            loop = self.train_loop
            loop._iter += 1
            self.call_hook('after_train_epoch')
            loop._epoch += 1
            if self._val_loop is not None:
                self.val_loop.run()
            self.call_hook('after_train')
            self.call_hook('after_run')
        checkpoints = [path for pattern in PATTERNS for path in Path(self.work_dir).glob(pattern)]
        if checkpoints:
            self.resume(str(checkpoints[0]))
        for path in checkpoints:
            path.unlink()  # three stages' optimizers may not fit on the disk beside each other
        return self.model

    def build_dataloader(
        self, dataloader: DataLoader | dict[str, Any], seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """The training loader as it is; of any other loader's images only the largest and the smallest."""
        if dataloader is not self._train_dataloader and isinstance(dataloader, Mapping):
            options = dict(dataloader, num_workers=0, persistent_workers=False, num_batch_per_epoch=None)
            for name in ('prefetch_factor', 'batch_sampler', 'drop_last'):
                options.pop(name, None)
            dataset = options['dataset']
            dataset = DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset
            picks = largest_and_smallest(dataset)
            dataloader = dict(options, dataset=dataset, sampler=dict(type=_Picked, picks=picks))
        return StageRunner.build_dataloader(dataloader, seed, diff_rank_seed)


def largest_and_smallest(dataset: Dataset) -> list[int]:
    """The places of the images with the most and the fewest pixels; of the first and the last if that is not known.

    One place if all images have the same number.
    """
    try:
        sizes = [_pixels(dataset.get_data_info(place)['img_path']) for place in range(len(dataset))]
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        sizes = list(range(len(dataset)))
    return list(dict.fromkeys([sizes.index(max(sizes)), sizes.index(min(sizes))]))


def _pixels(path: str) -> int:
    width, height = size_of(path)
    return width * height

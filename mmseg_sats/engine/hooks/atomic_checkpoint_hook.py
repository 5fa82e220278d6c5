# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""mmengine's checkpoints, written completely or not at all, by epoch and by iteration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmseg_sats.engine.files.snapshot import unwrap
from mmseg_sats.utils.checkpoint import write_atomically, write_text

_WITHOUT = (
    'default_hooks.checkpoint is {}, not AtomicCheckpointHook: a stop within an epoch loses the epoch, and a process '
    'that is killed while it writes may leave half a file, which --resume passes over for an older one'
)
BACKEND = 'mmseg_sats_atomic'
PATTERNS = ('epoch_*.pth', 'iter_*.pth')


class AtomicBackend(LocalBackend):
    """Local files that get their name only when all their bytes are on the disk."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes ``obj`` to ``filepath``, through a temporary file beside it."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(filepath, lambda file: file.write(obj))


register_backend(BACKEND, AtomicBackend, force=True)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """Saves a checkpoint after every epoch and, if ``iters`` is set, every ``iters`` iterations.

    With ``by_epoch=False`` a checkpoint is saved every ``interval`` iterations in place of epochs, and before every
    validation, which a signal ends at once.

    Each checkpoint is written to a temporary file, fsynced and renamed; only then are older ones
    removed. If the optimizer accumulates the gradients of several iterations, the gradients so far are
    saved too. When a signal stops the run, one more checkpoint is saved (``before_stop``).

    Args:
        iters: iterations between two checkpoints, beside those of ``interval``; None: no others.
        max_keep_ckpts: how many of the newest checkpoints to keep.
        options: as in mmengine's ``CheckpointHook``, ``interval`` in epochs or, with
            ``by_epoch=False``, in iterations.

    Raises:
        ValueError: ``iters`` or ``max_keep_ckpts`` is not a whole number from 1.
    """

    def __init__(self, iters: int | None = None, max_keep_ckpts: int = 2, **options: Any) -> None:
        for name, value in (('iters', iters), ('max_keep_ckpts', max_keep_ckpts)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not whole and not (name == 'iters' and value is None):
                raise ValueError(
                    f'AtomicCheckpointHook: {name}={value!r}, expected a whole number from 1'
                )
        # mmengine would remove old checkpoints before it writes the new one, so its own counting is off (-1).
        super().__init__(max_keep_ckpts=-1, backend_args=dict(backend=BACKEND), **options)
        self.iters = iters
        self.keep = max_keep_ckpts
        self._saved = -1

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Sequence[dict] | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Saves every ``iters`` iterations."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if self.iters and self.every_n_train_iters(runner, self.iters) and self._saved != runner.iter + 1:
            self._save(runner, runner.iter + 1)

    def before_val(self, runner: Runner) -> None:
        """Saves the state before a validation within an epoch, if it is not saved yet."""
        if not self.by_epoch and runner.iter not in (0, self._saved):
            self._save(runner, runner.iter)

    def before_stop(self, runner: Runner) -> None:
        """Saves the state after the iteration at which the loop stops."""
        self._save(runner, runner.iter)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Adds the accumulated gradients if the optimizer has not made its step with them yet."""
        wrapper = getattr(runner, 'optim_wrapper', None)
        if getattr(wrapper, '_accumulative_counts', 1) > 1 and not wrapper.should_update():
            checkpoint['gradients'] = {
                name: parameter.grad.detach().cpu()
                for name, parameter in unwrap(runner.model).named_parameters()
                if parameter.grad is not None
            }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Restores those gradients when the run is resumed."""
        gradients = checkpoint.get('gradients', {})
        for name, parameter in unwrap(runner.model).named_parameters():
            if name in gradients and runner._resume:
                parameter.grad = gradients[name].to(parameter)

    def _save(self, runner: Runner, done: int) -> None:
        """Saves a checkpoint within an epoch, after ``done`` iterations of the stage."""
        runner.logger.info(f'Saving checkpoint at {done} iterations')
        self._write(runner, f'iter_{done}.pth', dict(epoch=runner.epoch, iter=done))

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        self._write(runner, self.filename_tmpl.format(step), meta)

    def _write(self, runner: Runner, name: str, meta: dict[str, Any]) -> None:
        self.last_ckpt, self._saved = str(Path(self.out_dir) / name), meta['iter']
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            write_text(Path(runner.work_dir) / 'last_checkpoint', self.last_ckpt)
            self._remove_older(name)

    def _remove_older(self, newest: str) -> None:
        paths = [path for pattern in PATTERNS for path in Path(self.out_dir).glob(pattern)]
        others = [path for path in paths if path.name != newest]
        others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in others[self.keep - 1 :]:
            path.unlink()


def note_on_checkpoints(cfg: Config) -> str:
    """What a stage's config gives up where another hook writes the checkpoints, or ''."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    kind = HOOKS.get(hook['type']) if isinstance(hook.get('type'), str) else hook.get('type')
    if not isinstance(kind, type) or issubclass(kind, AtomicCheckpointHook):
        return ''
    return _WITHOUT.format(kind.__name__)

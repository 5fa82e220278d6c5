# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""TensorBoard, W&B and the like with all stages of a run on one axis."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.visualization.vis_backend import BaseVisBackend
from mmseg.registry import VISBACKENDS
from torch import nn

from mmseg_sats.utils.checkpoint import write_json

ITERATIONS_FILE = 'iterations.json'


@VISBACKENDS.register_module()
class OneAxisVisBackend(BaseVisBackend):
    """Wraps another backend, so that it sees all stages of a run as one training.

    It writes into ``WORK_DIR/vis_data`` instead of the stage's folder, and continues counting the
    iterations from those of the earlier stages, which it keeps in ``iterations.json`` there. If a
    stage is run outside a run's work dir, it changes nothing.

    Args:
        backend: config of the backend, without ``save_dir``. ``WandbVisBackend`` gets the run's own
            ``id``, so that every stage goes on with the same W&B run.
        save_dir: the stage's folder for logs, which mmengine's visualizer gives.
    """

    def __init__(self, backend: dict[str, Any], save_dir: str) -> None:
        super().__init__(save_dir)
        stage = _stage_folder(Path(save_dir))
        self._stage = None if stage is None else stage.name
        self._folder = Path(save_dir) if stage is None else stage.parent / 'vis_data'
        backend = dict(backend)
        if backend['type'] == 'WandbVisBackend' and stage is not None:
            backend['init_kwargs'] = _wandb_run(stage.parent) | dict(backend.get('init_kwargs', {}))
        self.backend: BaseVisBackend = VISBACKENDS.build(
            dict(backend, save_dir=str(self._folder))
        )
        self.offset = self._iterations_before()
        self._last = 0

    def _iterations_before(self) -> int:
        """Iterations of all earlier stages of the run."""
        if self._stage is None:
            return 0
        own = int(self._stage.removeprefix('stage_'))
        return sum(
            count
            for name, count in self._read().items()
            if int(name.removeprefix('stage_')) < own
        )

    def _read(self) -> dict[str, int]:
        path = self._folder / ITERATIONS_FILE
        return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}

    def _init_env(self) -> None:
        """The backend initialises itself on first use."""

    @property
    def experiment(self) -> Any:
        """The backend's own."""
        return self.backend.experiment

    def add_config(self, config: Config, **kwargs: Any) -> None:
        """Hands the stage's config on."""
        self.backend.add_config(config, **kwargs)

    def add_graph(self, model: nn.Module, data_batch: Sequence[dict], **kwargs: Any) -> None:
        """Hands the model on."""
        self.backend.add_graph(model, data_batch, **kwargs)

    def add_image(self, name: str, image: Any, step: int = 0, **kwargs: Any) -> None:
        """Hands an image (h, w, 3) on, at the run's iteration."""
        self.backend.add_image(name, image, self._count(step), **kwargs)

    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        """Hands a number on, at the run's iteration."""
        self.backend.add_scalar(name, value, self._count(step), **kwargs)

    def add_scalars(
        self, scalar_dict: dict, step: int = 0, file_path: str | None = None, **kwargs: Any
    ) -> None:
        """Hands numbers on, at the run's iteration; ``file_path`` is ignored."""
        values = {name: value for name, value in scalar_dict.items() if name != 'step'}
        self.backend.add_scalars(values, self._count(step), None, **kwargs)

    def _count(self, step: int) -> int:
        self._last = max(self._last, step)
        return self.offset + step

    def close(self) -> None:
        """Closes the backend and records how many iterations the stage had."""
        self.backend.close()
        if self._stage is not None and self._last and is_main_process():
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / ITERATIONS_FILE, self._read() | {self._stage: self._last})


def _stage_folder(folder: Path) -> Path | None:
    """The ``stage_k`` above a folder, or None."""
    for parent in folder.resolve().parents:
        if re.fullmatch(r'stage_\d+', parent.name):
            return parent
    return None


def _wandb_run(work_dir: Path) -> dict[str, Any]:
    """W&B's arguments for continuing the same run at every stage."""
    return dict(
        id=hashlib.sha256(str(work_dir).encode()).hexdigest()[:16],
        name=work_dir.name,
        resume='allow',
        allow_val_change=True,
    )

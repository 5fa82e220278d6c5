# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What exists of each run in the tables' work dir, read from the files that runs write."""

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from mmseg_sats.engine.config.stage_config import stage_dir
from mmseg_sats.engine.experiments.compare import Fingerprint, explain, fingerprint, same_start
from mmseg_sats.engine.experiments.plan import Run
from mmseg_sats.utils.user_modules import read_file


class Record:
    """Compares a run's folder with the run that was asked for.

    Args:
        out: the tables' work dir, which holds one folder for each run.
        run: the run.
        seeded_start: whether runs with different seeds each have their own stage 0.
        accept: config paths whose difference does not count.

    Raises:
        KeyError: the config uses a variable that it does not define.
        ValueError: an impossible protocol, or options that do not fit the config.
    """

    def __init__(
        self, out: Path, run: Run, seeded_start: bool = False, accept: Sequence[str] = ()
    ) -> None:
        self.out = out
        self.run = run
        self.folder = out / run.name
        self.seeded_start = seeded_start
        self.accept = tuple(accept)

    @cached_property
    def asked(self) -> Fingerprint:
        """The fingerprint of what is asked."""
        return fingerprint(self.run.load(), seeded_start=self.seeded_start)

    def stages_done(self) -> int:
        """How many stages are finished."""
        return sum(
            (stage_dir(self.folder, index) / 'done').exists() for index in range(self.asked.num_stages)
        )

    def results(self) -> dict[str, Any] | None:
        """results.json, or None while a stage is missing."""
        path = self.folder / 'results.json'
        if not path.exists():
            return None
        results = json.loads(path.read_text())
        return results if len(results['stages']) == self.asked.num_stages else None

    def train_seconds(self) -> float:
        """Seconds that training took, all stages together; a stage 0 from elsewhere counts nothing."""
        files = [stage_dir(self.folder, index) / 'metrics.json' for index in range(self.asked.num_stages)]
        metrics = [json.loads(path.read_text()) for path in files if path.exists()]
        return sum(
            stage['train_seconds'] for stage in metrics if stage['results']['images'] is not None
        )

    def conflict(self) -> str:
        """Why the run in the folder is not the one asked for; empty if it is, or if there is none."""
        if not (self.folder / 'config.py').exists():
            return ''
        try:
            there, _ = self._read(self.folder)
        except Exception as error:  # any error that a foreign or truncated config.py raises
            return f'config.py there cannot be read: {error}'
        return explain(there, self.asked, self.accept) or self._foreign_start()

    def base(self) -> Path | None:
        """The checkpoint that stage 0 was taken from, according to the run's own files."""
        if not (self.folder / 'config.py').exists():
            return None
        _, base = self._read(self.folder)
        if not base:
            return None
        # The path is relative to where the command was given; the run it names is beside this one.
        beside = self.out.joinpath(*Path(base).parts[-3:])
        return beside if beside.exists() else Path(base)

    def _foreign_start(self) -> str:
        """Why the stage 0 it was given is not the one asked for."""
        base = self.base()
        if self._own_base:
            same = base is not None and Path(self._own_base).resolve() == base.resolve()
            return '' if same or 'base' in self.accept else f'base: {base} there, {self._own_base} asked'
        if base is None:
            return ''
        owner = base.parents[1]
        if not (owner / 'config.py').exists():
            return '' if 'base' in self.accept else f'stage 0 was taken from {base}, whose config is gone'
        there, _ = self._read(owner)
        if 'base' in self.accept or same_start(there, self.asked, self.accept):
            return ''
        return f'stage 0 was taken from {base}, which is trained otherwise'

    @cached_property
    def _own_base(self) -> str | None:
        """The checkpoint that its config takes stage 0 from."""
        return self.run.load().get('base')

    def find_start(self) -> Path | None:
        """A finished stage 0 in the work dir that this run may take; None where it must train its own."""
        if self._own_base:
            return None
        for done in sorted(self.out.glob('*/stage_0/done')):
            owner = done.parents[1]
            if owner != self.folder and self._may_start_from(owner):
                return done.with_name('snapshot.pth')
        return None

    def _may_start_from(self, owner: Path) -> bool:
        try:
            there, base = self._read(owner)
            return not base and same_start(there, self.asked, self.accept)
        except Exception:  # a folder that is no run of this package, or a run of another version
            return False

    def _read(self, folder: Path) -> tuple[Fingerprint, str | None]:
        """The fingerprint of the config that a run wrote, and the checkpoint that it took stage 0 from."""
        path = folder / 'config.py'
        version = path.stat().st_mtime_ns
        # Its data may have moved since: the classes are counted in what is asked.
        return _read_version(path, version, self.asked.num_classes, self.seeded_start)


@lru_cache(maxsize=1024)
def _read_version(
    path: Path, version: int, num_classes: int, seeded_start: bool
) -> tuple[Fingerprint, str | None]:
    cfg = read_file(path)
    return fingerprint(cfg, num_classes, seeded_start), cfg.get('base')

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""From a table's rows to runs: which config, options and folder each figure of the table comes from."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from mmseg_sats.engine.checks.preflight import check_cfg_options, known_keys
from mmseg_sats.engine.config.defaults import set_defaults
from mmseg_sats.engine.config.own_scope import drop_own_scope
from mmseg_sats.engine.config.stage_length import prefer_length
from mmseg_sats.engine.experiments.tables import SYSTEMS, TABLE_DATASETS, DataSet, Part, Row, Table
from mmseg_sats.protocol import JOINT
from mmseg_sats.utils.spelling import check_choice, near_match
from mmseg_sats.utils.user_modules import read_file


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: its folder in the tables' work dir, ``sats_m_without_attention_15-1_seed0``.
        config: its config file.
        options: what ``--cfg-options`` overrides, including seed and memory.
    """

    name: str
    config: Path
    options: tuple[str, ...]

    def load(self) -> Config:
        """The config as the run will have it, except for its work dir.

        Raises:
            KeyError: the config has no such option.
            ValueError: an option does not fit the config, or has no value.
        """
        cfg = read_file(self.config)
        drop_own_scope(cfg)
        options = parse_options(self.options)
        check_cfg_options(cfg, options)
        try:
            prefer_length(cfg, options)
            cfg.merge_from_dict(options)
        except (AssertionError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f'{" ".join(self.options)} does not fit {self.config}: {error}') from error
        set_defaults(cfg)
        return cfg


@dataclass(frozen=True)
class Cell:
    """A row on one protocol, with or without memory: one run for each seed, none where a config is missing."""

    part: Part
    row: Row
    protocol: str
    memory: int
    runs: tuple[Run, ...] = ()


@dataclass
class Plan:
    """All cells of a table, and messages about the cells that cannot be run because a config is missing."""

    cells: list[Cell] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """Every run once, in the table's order."""
        return list({run.name: run for cell in self.cells for run in cell.runs}.values())


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """``k=v`` options as ``--cfg-options`` reads them.

    Raises:
        ValueError: an option without ``=``.
    """
    wrong = [option for option in options if '=' not in option]
    if wrong:
        raise ValueError(f'--cfg-options {" ".join(wrong)}: expected KEY=VALUE')
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='*', action=DictAction, default={})
    return parser.parse_args(['--options', *options]).options


def find_systems(configs: Path) -> list[str]:
    """The systems of the tables, then every other folder of configs."""
    there = sorted(path.parent.name for path in configs.glob('[a-z]*/[a-z]*.py'))
    return list(dict.fromkeys([*SYSTEMS, *there]))


def memory_sizes(memory: str, dataset: str, data: DataSet | None = None) -> tuple[int, ...]:
    """The sizes that ``--memory`` asks for: ``'none'``, ``'memory'`` (the data set's), ``'both'`` or a number.

    Args:
        memory: one of these.
        dataset: the name of the data set.
        data: the data set, if ``TABLE_DATASETS`` does not have it; None where its memory is not known either.

    Raises:
        ValueError: none of these.
    """
    if memory.isdecimal():
        return (int(memory),)
    data = data or TABLE_DATASETS.get(dataset)
    own = data.memory if data else 0
    if not own and memory != 'none':
        raise ValueError(f'--memory {memory}: there is no usual number for {dataset}, expected none or a number')
    check_choice('--memory', memory, options := dict(none=(0,), memory=(own,), both=(0, own)))
    return options[memory]


def make_plan(
    table: Table,
    dataset: str,
    configs: Path,
    *,
    systems: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    protocols: Sequence[str] | None = None,
    memories: Sequence[int] = (0,),
    seeds: Sequence[int] = (0,),
    options: Sequence[str] = (),
    data: DataSet | None = None,
) -> Plan:
    """The runs of a table.

    Args:
        table: which table.
        dataset: a name of ``TABLE_DATASETS``.
        configs: the folder of configs, one folder for each method in it.
        systems: rows of a table of systems, or of their variants; all by default.
        variants: rows of a table of variants beside the method as it is; all by default.
        protocols: by default those that the paper shows, or all of the data set where it shows none of them.
        memories: sizes of the memory, 0 without.
        seeds: seeds.
        options: further options for ``--cfg-options``; each is for the configs that have it.
        data: the data set, if ``TABLE_DATASETS`` does not have it.

    Raises:
        ValueError: a system that neither the tables nor the folder know, or a variant that the table lacks.
    """
    data = data or TABLE_DATASETS[dataset]
    known = find_systems(configs)
    for system in systems or ():
        check_choice('--methods', system, known)
    rows = [row for part in table.parts for row in part.rows]
    for variant in variants or ():
        check_choice('--variants', variant, list(dict.fromkeys(row.variant for row in rows if row.variant)))
    plan = Plan()
    for part in table.parts_for(systems or known):
        for protocol in protocols or _protocols(part, data):
            for memory in memories:
                for row in part.rows:
                    if systems and row.method not in systems:
                        continue
                    if variants and row.variant and row.variant not in variants:
                        continue
                    config = _find_config(configs, row, data.model, dataset, protocol, memory)
                    if memory and _is_joint(config):
                        continue  # one stage has no old images to keep
                    if isinstance(config, str):
                        plan.missing.append(config)
                    runs = () if isinstance(config, str) else tuple(
                        _run(row, config, protocol, memory, seed, options) for seed in seeds
                    )  # fmt: skip
                    plan.cells.append(Cell(part, row, protocol, memory, runs))
    plan.missing = list(dict.fromkeys(plan.missing))
    return plan


@lru_cache(maxsize=1024)
def _known_keys(config: Path) -> frozenset[str]:
    return frozenset(known_keys(Config.fromfile(config, import_custom_modules=False)))


def _key(option: str) -> str:
    return option.split('=')[0].split('.')[0]


def fitting_options(config: Path, options: Sequence[str]) -> Iterator[str]:
    """The options that a config has: Table 1 asks for a folder of outside images, which most systems do not know."""
    return (option for option in options if _key(option) in _known_keys(config))


def check_options(runs: Sequence[Run], options: Sequence[str]) -> None:
    """Checks that each option is one that some config has, since it would do nothing otherwise.

    Raises:
        ValueError: no config has it.
    """
    known = {key for run in runs for key in _known_keys(run.config)}
    for option in options if runs else ():
        if _key(option) not in known:
            raise ValueError(
                f'--cfg-options {option}: none of the configs has {_key(option)!r}{near_match(_key(option), known)}'
            )


def _is_joint(config: Path | str) -> bool:
    return isinstance(config, Path) and Config.fromfile(config, import_custom_modules=False).protocol == JOINT


def _protocols(part: Part, data: DataSet) -> tuple[str, ...]:
    return tuple(protocol for protocol in part.protocols if protocol in data.protocols) or data.protocols


def _find_config(
    configs: Path, row: Row, model: str, dataset: str, protocol: str, memory: int
) -> Path | str:
    """The row's config file, one made for memory (``_m``) first, or a text that says what is missing."""
    model = f'{row.model}*' if row.model else model
    folder = configs / row.method
    for end in ('_m', '') if memory else ('',):
        paths = sorted(folder.glob(f'{model}_{dataset}_{protocol}{end}.py'))
        if paths:
            return paths[0]
    if not folder.is_dir():
        return f'{configs.name}/{row.method} does not exist'
    return f'{configs.name}/{row.method}/{model}_{dataset}_{protocol}.py does not exist'


def _run(
    row: Row, config: Path, protocol: str, memory: int, seed: int, options: Sequence[str]
) -> Run:
    name = '_'.join(filter(None, (row.method, 'm' if memory else '', row.variant)))
    own = (f'seed={seed}', f'memory={memory}', *row.options)
    return Run(f'{name}_{protocol}_seed{seed}', config, (*fitting_options(config, options), *own))

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Rows of a table that are a user's own: every config of a run in a folder, or every method on the user's data set."""

import ast
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from mmseg_sats.engine.config.defaults import set_defaults
from mmseg_sats.engine.config.own_scope import drop_own_scope
from mmseg_sats.engine.config.variables import STAGE_VARIABLES, config_variables, resolve_variables
from mmseg_sats.engine.experiments.plan import Cell, Run, fitting_options
from mmseg_sats.engine.experiments.tables import DataSet, Part, Row
from mmseg_sats.protocol import JOINT
from mmseg_sats.utils.checkpoint import write_text
from mmseg_sats.utils.installed import CONFIGS, method_names
from mmseg_sats.utils.user_modules import read_file

# They stand in one table with the systems that --methods names.
_PART = Part('systems', 'systems', ())
# The first word in the names of configs that are written here, where the package's own have the model's name.
_MODEL = 'own'


@dataclass(frozen=True)
class OwnConfig:
    """A config of a run.

    Attributes:
        path: its file.
        name: what the table calls it: its path in the folder, without the suffix.
        method: its method.
        dataset: the name of its data set, ``own`` if it has none.
        protocol: its protocol; of joint training that whose base and new classes are reported.
        joint: whether it has one stage alone.
        memory: how many exemplars it keeps, 0 for none.
    """

    path: Path
    name: str
    method: str
    dataset: str
    protocol: str
    joint: bool
    memory: int


def find_configs(folder: Path) -> tuple[list[OwnConfig], list[str]]:
    """The configs of runs in a folder, in the order of their names.

    Left out are methods' files, which have no model, Python modules (files that define or import something), and all
    that runs have written. So are models that other configs complete by a method, which is worth a note.

    Returns:
        The configs, and a note for each of these models.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there is no config of a run in it, or one of them cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'--configs {folder} does not exist: expected a folder of configs')
    found, notes = [], []
    folder = folder.absolute()  # the method's name may be that of the folder, wherever the command is given
    for path in _files(folder):
        try:
            cfg = read_file(path)
        except (KeyError, OSError, SyntaxError, TypeError) as error:
            raise ValueError(f'--configs: {path} cannot be read: {error}') from error
        if cfg.get('model') is None or cfg.get('protocol') is None:
            continue
        if undefined := _undefined(cfg):
            notes.append(f'{path} is a part that configs inherit from: {undefined}')
            continue
        drop_own_scope(cfg)
        set_defaults(cfg)
        joint = cfg.protocol == JOINT
        protocol = cfg.get('split') or JOINT if joint else cfg.protocol
        name = path.relative_to(folder).with_suffix('').as_posix()
        found.append(OwnConfig(path, name, cfg.method, cfg.get('dataset') or 'own', protocol, joint, cfg.memory))
    if not found:
        raise ValueError(
            f'--configs {folder}: expected configs of runs in it, with a model, a method and a protocol; found none'
        )
    return found, notes


def _undefined(cfg: Config) -> str:
    """What a config uses and does not define; empty if there is no such thing."""
    try:
        resolve_variables(cfg.model.to_dict(), config_variables(cfg) | dict.fromkeys(STAGE_VARIABLES, 1))
    except KeyError as error:
        return error.args[0].split(';')[0]
    return ''


def _files(folder: Path) -> Iterator[Path]:
    """Python files that only assign values, outside hidden folders and the work dirs of runs."""
    for place, folders, files in os.walk(folder):
        if any(name.startswith('stage_') for name in folders):
            folders.clear()  # a run's work dir
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(('.', '__')))
        paths = (Path(place, name) for name in sorted(files) if name.endswith('.py'))
        yield from (path for path in paths if _assigns(path))


def _assigns(path: Path) -> bool:
    """Whether a file may be a config; a module of the user's must not be run for an answer."""
    try:
        body = ast.parse(path.read_text(encoding='utf-8')).body
    except (SyntaxError, UnicodeDecodeError):
        return False
    names = _names(body)
    code = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return bool({'_base_', 'model'} & names) and not any(isinstance(node, code) for node in body)


def own_cells(
    configs: Sequence[OwnConfig], memories: Sequence[int] | None, seeds: Sequence[int], options: Sequence[str]
) -> list[Cell]:
    """A row for each config, or one for each size of the memory.

    Args:
        configs: the configs, of one data set.
        memories: sizes of the memory; None leaves each config its own.
        seeds: seeds.
        options: further options for ``--cfg-options``; each is for the configs that have it.
    """
    cells = []
    for config in configs:
        for memory in (config.memory,) if memories is None else memories:
            if memory and config.joint:
                continue  # one stage has no old images to keep
            name = config.name.replace('/', '_') + (f'_memory{memory}' if memory != config.memory else '')
            runs = tuple(
                Run(f'{name}_seed{seed}', config.path,
                    (*fitting_options(config.path, options), f'seed={seed}', f'memory={memory}'))
                for seed in seeds
            )  # fmt: skip
            row = Row(config.name, config.name, method=config.method)
            cells.append(Cell(_PART, row, config.protocol, memory, runs))
    return cells


def read_recipe(path: Path) -> Config:
    """A config with a user's data, model and schedule, to which every method can be added.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, lacks one of these, or has parts of a method already.
    """
    if not path.is_file():
        raise FileNotFoundError(f'--dataset {path} does not exist: expected a name, or a config of your own')
    try:
        cfg = read_file(path)
    except (KeyError, OSError, SyntaxError, TypeError) as error:
        raise ValueError(f'--dataset: {path} cannot be read: {error}') from error
    missing = [key for key in ('model', 'train_dataloader', 'optim_wrapper') if cfg.get(key) is None]
    if missing:
        raise ValueError(
            f'--dataset {path} has no {", ".join(missing)}: expected a config with data, model and schedule, '
            "such as one with _base_ = 'mmseg_sats::_base_/segformer_b0_folders.py'"
        )
    parts = set(cfg).intersection(*(_assigned(_method_file(name)) for name in method_names()))
    if parts:
        raise ValueError(f'--dataset {path} has {", ".join(sorted(parts))} of a method: the table adds each method')
    return cfg


def write_runs(
    path: Path, folder: Path, protocols: Sequence[str] | None, options: Sequence[str]
) -> tuple[DataSet, dict[str, str]]:
    """Writes a config for each of the package's methods on a user's data set and protocol.

    Args:
        path: the user's config, see :func:`read_recipe`.
        folder: where they are written, as ``METHOD/own_NAME_PROTOCOL.py``.
        protocols: the protocols; None takes that of the config.
        options: those for ``--cfg-options``.

    Returns:
        The data set as the tables know it, and for each method that cannot run on it what it lacks.

    Raises:
        FileNotFoundError, ValueError: as in :func:`read_recipe`.
    """
    cfg = read_recipe(path)
    if not protocols and cfg.get('protocol') in (None, JOINT):
        raise ValueError(f'--dataset {path} has protocol={cfg.get("protocol")!r}: expected m-n in it or by --protocols')
    data = DataSet(_MODEL, cfg.get('memory') or 0, tuple(protocols or [cfg.protocol]))
    outside_root = cfg.get('outside_root') or any(option.startswith('outside_root=') for option in options)
    lacking = {}
    for method in method_names():
        outside = 'outside_labeler' in _assigned(_method_file(method))
        if outside and not outside_root:
            lacking[method] = f'{method} needs images from outside: --cfg-options outside_root=FOLDER'
            continue
        for protocol in data.protocols:
            words = f'protocol = {protocol!r}\n'
            if method == JOINT:
                words = f'protocol = {JOINT!r}\nsplit = {protocol!r}\n'
            if outside:
                words += f'outside_root = {cfg.get("outside_root")!r}\n'
                words += "outside_dataset = dict(type='ImageFolder', root='$outside_root')\n"
            text = f"_base_ = [{str(path.resolve())!r}, 'mmseg_sats::{method}/{method}.py']\n{words}"
            file = folder / method / f'{_MODEL}_{path.stem}_{protocol}.py'
            if not file.exists() or file.read_text(encoding='utf-8') != text:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, text)
    return data, lacking


def _method_file(method: str) -> Path:
    return CONFIGS / method / f'{method}.py'


def _assigned(path: Path) -> set[str]:
    """The top-level names that a config sets."""
    return _names(ast.parse(path.read_text(encoding='utf-8')).body)


def _names(body: Sequence[ast.stmt]) -> set[str]:
    return {getattr(target, 'id', '') for node in body if isinstance(node, ast.Assign) for target in node.targets}

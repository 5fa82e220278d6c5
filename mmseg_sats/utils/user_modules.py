# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Reads configs, and finds the user's own modules that they import: every command reads them here.

A config names modules in ``custom_imports`` and ``method_imports``. Python finds those that are installed or that
``PYTHONPATH`` names. The others are looked for beside the user's files, and only the folders that hold one are added
to ``sys.path``, at its end, so that nothing installed is ever hidden. Processes that load data get a copy of it.
"""

import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError

from mmseg_sats.utils.installed import CONFIGS, config_names
from mmseg_sats.utils.spelling import near_match

_PACKAGE = 'mmseg_sats'
_INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ('stdlib', 'purelib', 'platlib'))
# The folders that were added to sys.path.
_added: list[Path] = []


def read_file(path: str | Path) -> Config:
    """Reads a config and imports the modules that it names.

    Args:
        path: a config of a run or of a stage, or the mmseg config of a trained model.

    Raises:
        ValueError: a module is not found or cannot be imported.
    """
    try:
        cfg = Config.fromfile(path, import_custom_modules=False)
    except ImportError as error:  # of code in the config itself
        raise ValueError(f'{path} cannot be read: {_told(error)}') from error
    except ConfigParsingError as error:
        raise ValueError(
            f'{path} cannot be read: the configs of this package are inherited by a line _base_ = ..., not by '
            f'read_base() ({str(error).split(".")[0]})'
        ) from error
    except FileNotFoundError as error:
        _raise_for_base(path, error)
        raise
    import_custom(cfg)
    return cfg


def _raise_for_base(path: str | Path, error: FileNotFoundError) -> None:
    """Raises FileNotFoundError with the nearest name if a config inherits from one of ours that is not there."""
    for base in re.findall(rf'{_PACKAGE}::([^\'"\s]+)', Path(path).read_text(encoding='utf-8')):
        if not (CONFIGS / base).is_file():
            near = near_match(base, [f'{name}.py' for name in config_names()])
            raise FileNotFoundError(f"{path}: _base_ '{_PACKAGE}::{base}' does not exist{near}") from error


def import_custom(cfg: Config) -> None:
    """Imports the modules that ``custom_imports`` and ``method_imports`` name.

    ``import_folders`` of the config is set to the folders of those that are not installed, in place.

    Args:
        cfg: the config of a run or of a stage.

    Raises:
        ValueError: a module is not found or cannot be imported, or its name is that of another module.
    """
    custom = cfg.get('custom_imports') or {}
    import_modules(cfg, imports_of(cfg), 'custom_imports', may_fail=custom.get('allow_failed_imports', False))
    names = cfg.get('method_imports') or []
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        import_modules(cfg, names, 'method_imports')


def imports_of(cfg: Config) -> list[str]:
    """The modules that ``custom_imports`` of a config names; mmengine allows one as a text, without a list."""
    names = (cfg.get('custom_imports') or {}).get('imports') or []
    return [names] if isinstance(names, str) else list(names)


def add_imports(cfg: Config, names: Sequence[str]) -> None:
    """Adds modules to ``custom_imports`` of a config, in place, each once."""
    own = dict(cfg.get('custom_imports') or dict(allow_failed_imports=False))
    cfg.custom_imports = dict(own, imports=list(dict.fromkeys([*imports_of(cfg), *names])))


def import_modules(cfg: Config, names: Sequence[str], key: str, may_fail: bool = False) -> None:
    """Imports modules, and adds their folders to ``import_folders`` of the config, in place.

    Looked at, behind what Python looks at anyway, are the folder of the config, those of its bases, those of
    ``import_folders`` and the current one. Of a module ``my_methods.my_loss`` it is also enough if one of these
    folders is ``my_methods`` or lies within it.

    Args:
        cfg: the config that names them.
        names: dotted names.
        key: the key of the config that they stand in.
        may_fail: whether a module that cannot be imported is only warned of.

    Raises:
        ValueError: as in :func:`import_custom`.
    """
    for name in names:
        try:
            folder = _import(name, key, cfg)
        except ValueError as error:
            if not may_fail:
                raise
            warnings.warn(f'ignored: {error}', stacklevel=2)
        else:
            if folder is not None and str(folder) not in (known := cfg.get('import_folders') or []):
                cfg.import_folders = [*known, str(folder)]


def _import(name: str, key: str, cfg: Config) -> Path | None:
    """Imports a module; returns the folder that Python must know for it, or None if it is installed."""
    if name.endswith('.py') or not all(part.isidentifier() for part in name.split('.')):
        raise ValueError(
            f"{key}: {name!r} is no module's name: expected dots and no .py, such as 'my_methods.my_loss'"
        )
    folders = list(dict.fromkeys(_folders(cfg)))
    found = next((root for folder in folders for root in _roots(folder, name) if _file(root, name)), None)
    if found is not None:
        _check_not_another(name, _file(found, name), key)
        if not _python_finds(name):
            sys.path.append(str(found))
            _added.append(found.resolve())
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f'{name}.'.startswith(f'{error.name}.'):
            raise ValueError(f'{key}: {name} was found, but {_told(error)}') from error
        looked = ', '.join(map(str, folders))
        raise ValueError(
            f'{key}: Python finds no module {error.name} (of {name!r}{_named_by(cfg)}), nor is it in {looked}: '
            'expected the name of a module, not of a class; put its file there, or name its folder by PYTHONPATH'
        ) from error
    except Exception as error:  # whatever the module's code raises
        raise ValueError(f'{key}: {name} was found, but importing it failed: {_told(error)}') from error
    return _root_of(name, getattr(module, '__file__', None))


def _named_by(cfg: Config) -> str:
    return f', which {cfg.filename} names' if cfg.filename else ''


def _folders(cfg: Config) -> Iterator[Path]:
    """Where the user's modules may be."""
    if cfg.filename:
        yield from (path.parent for path in _with_bases(Path(cfg.filename).resolve()))
    yield from map(Path, cfg.get('import_folders') or [])
    yield Path.cwd()


def _with_bases(path: Path) -> Iterator[Path]:
    """A config's file and those that it inherits from, but for the files of packages (``PACKAGE::...``)."""
    if path.is_file():
        yield path
        for base in Config._get_base_files(str(path)):
            if '::' not in base:
                yield from _with_bases((path.parent / base).resolve())


def _roots(folder: Path, name: str) -> Iterator[Path]:
    """The folder itself, and that above the package if the folder is in it."""
    yield folder
    package = name.split('.')[0]
    if package != name:
        yield from (part.parent for part in (folder, *folder.parents) if part.name == package)


def _file(root: Path, name: str) -> Path | None:
    path = root.joinpath(*name.split('.'))
    files = (path.parent / f'{path.name}.py', path / '__init__.py')
    return next((file for file in files if file.is_file()), None)


def _python_finds(name: str) -> bool:
    """Whether ``import`` finds the module without our help; a folder without code does not count."""
    try:
        spec = find_spec(name)
    except ModuleNotFoundError as error:
        return error.name is None or not f'{name}.'.startswith(f'{error.name}.')
    except Exception:  # the package that it lies in raised: importing it says what
        return True
    return spec is not None and spec.origin is not None


def _check_not_another(name: str, file: Path, key: str) -> None:
    """Refuses a second module of a name, as two configs that are read by one process may have."""
    there = getattr(sys.modules.get(name), '__file__', None)
    root = _root_of(name, there)
    if root is not None and root.resolve() in _added and not file.samefile(there):
        raise ValueError(
            f'{key}: {name} is {file} here, and {there} in a config that was read before: expected two names, or a '
            'command for each'
        )


def _root_of(name: str, file: str | Path | None) -> Path | None:
    """The folder in ``sys.path`` by which a module's file was found; None if it is installed."""
    if file is None or name.split('.')[0] == _PACKAGE:
        return None
    path = Path(file).absolute()
    if any(path.resolve().is_relative_to(folder) for folder in _INSTALLED):
        return None
    depth = len(name.split('.')) - (path.name != '__init__.py')
    return path.parents[depth]


def _told(error: BaseException) -> str:
    """An error of the user's code in one line: where, what."""
    if isinstance(error, SyntaxError) and error.filename:
        where = f'{error.filename}, line {error.lineno}'
        message = error.msg
    else:
        where = _line_of(error.__traceback__)
        message = ' '.join(str(error).split())
    return f'{where}{": " if where else ""}{type(error).__name__}: {message}'


def _line_of(trace: TracebackType | None) -> str:
    """The innermost line of the user's own code that an error went through."""
    foreign = (*_INSTALLED, Path(__file__).resolve().parents[1])
    for frame in reversed(traceback.extract_tb(trace)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.resolve().is_relative_to(folder) for folder in foreign):
            return f'{frame.filename}, line {frame.lineno}'
    return ''

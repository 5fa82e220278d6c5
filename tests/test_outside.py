# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""docs/new_backbone.md followed in an empty folder: every command finds the reader's module, wherever it is given."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / 'docs/new_backbone.md').read_text(encoding='utf-8')
# Each command gets a process of its own, forked from one that has imported the package but nothing of the user's.
# `python -c` looks for modules in the current folder, `mmseg-sats` does not.
COMMANDS = """
import json, os, sys
sys.path.remove('')
import mmseg_sats.engine, mmseg_sats.commands

for folder, words, log in json.load(sys.stdin):
    child = os.fork()
    if not child:
        os.chdir(folder)
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.exit(mmseg_sats.commands.main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Done:
    """How a command ended, and what it printed."""

    status: int
    text: str


def mmseg_sats(folder: Path, *commands: tuple[Path, str]) -> list[Done]:
    """Gives the commands one after another, each in its folder.

    Args:
        folder: where logs are written.
        commands: folder and words of each.
    """
    calls = [(str(place), words.split(), str(folder / f'{i}.txt')) for i, (place, words) in enumerate(commands)]
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', COMMANDS], input=json.dumps(calls), cwd=folder, text=True,
        capture_output=True, check=False, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = done.stdout.split()
    return [Done(int(code), Path(log).read_text()) for code, (*_, log) in zip(codes, calls, strict=True)]


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """The page's two files, and an image, in an empty folder."""
    folder = tmp_path / 'reader'
    folder.mkdir()
    code, config = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
    (folder / 'plain_pyramid.py').write_text(code)
    (folder / 'plain_pyramid_shapes_3-3.py').write_text(config)
    Image.new('RGB', (96, 64), 'green').save(folder / 'photograph.png')
    return folder


def test_every_command_works_on_a_readers_own_backbone(reader: Path, tmp_path: Path, shapes_root: Path) -> None:
    (train,) = re.findall(r'^    (mmseg-sats train .*)$', PAGE, re.M)
    (elsewhere := tmp_path / 'elsewhere').mkdir()
    (logs := tmp_path / 'logs').mkdir()
    small = (
        f'--cfg-options data_root={shapes_root} epochs=1 image_size=64 crop_size=64 train_images=24 val_images=12 '
        'batch_size=4 report=None train_dataloader.num_batch_per_epoch=2 test_dataloader.num_batch_per_epoch=4'
    )
    train = train.removeprefix('mmseg-sats ')
    run = tmp_path / 'runs/pyramid'
    config, image = reader / 'plain_pyramid_shapes_3-3.py', reader / 'photograph.png'
    commands = [
        (reader, f'check {config.name} {small}'),
        (reader, f'{train} --work-dir {run} {small}'),
        # From here on where neither the module nor the config is.
        (elsewhere, f'train {run}/config.py --work-dir {run} --resume'),
        (elsewhere, f'report {run}'),
        (elsewhere, f'predict {run}/stage_1 {image} --out predicted'),
        (elsewhere, f'attention {run}/stage_1 {image} --out attention.png'),
        (elsewhere, f'test {run} --stage 1'),
        (elsewhere, f'export {run}/stage_1'),
        (elsewhere, f'browse {config} --out sheets {small}'),
        (elsewhere, f'table --configs {reader} --report {small}'),
    ]
    done = mmseg_sats(logs, *commands)
    failed = [f'{words}\n{one.text[-2000:]}' for (_, words), one in zip(commands, done, strict=True) if one.status]
    assert not failed, '\n'.join(failed)
    assert 'no photographs' not in (run / 'report/index.html').read_text()
    assert (elsewhere / 'attention.png').is_file()
    assert len(json.loads((run / 'test/test.json').read_text())) == 1
    assert 'plain_pyramid_shapes_3-3' in done[-1].text
    exported = Config.fromfile(run / 'stage_1/export/config.py', import_custom_modules=False)
    assert exported.custom_imports.imports == ['plain_pyramid']


def test_a_module_that_is_gone_is_one_line(reader: Path, tmp_path: Path) -> None:
    config, image = reader / 'plain_pyramid_shapes_3-3.py', reader / 'photograph.png'
    (reader / 'plain_pyramid.py').unlink()
    stage = tmp_path / 'run/stage_1'
    stage.mkdir(parents=True)
    text = "custom_imports = dict(imports=['mmseg_sats', 'plain_pyramid'], allow_failed_imports=False)\n"
    (stage / 'config.py').write_text(f"{text}import_folders = [{str(reader)!r}]\nmodel = dict()\n")
    (stage / 'snapshot.pth').touch()
    commands = [
        f'train {config}', f'predict {stage} {image}', f'test {stage.parent}', f'table --configs {reader}',
    ]  # fmt: skip
    for one in mmseg_sats(tmp_path, *((tmp_path, words) for words in commands)):
        assert one.status == 1
        assert one.text.count('\n') == 1, one.text
        assert 'Python finds no module plain_pyramid' in one.text
        assert f'nor is it in {stage if str(stage) in one.text else reader}, ' in one.text

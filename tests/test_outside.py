# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""docs/new_backbone.md followed in an empty folder: every command finds the reader's module, wherever it is given."""

import json
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

from tests.forked import PACKAGE, Done, run_forked

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / 'docs/new_backbone.md').read_text(encoding='utf-8')


def mmseg_sats(*commands: tuple[Path, str]) -> list[Done]:
    """Gives the commands, folder and words of each, one after another.

    Each gets a process of its own, which has imported the package but nothing of the user's.
    """
    script = 'import sys, mmseg_sats\nsys.exit(mmseg_sats.commands.main({!r}))'
    folders, words = zip(*commands, strict=True)
    return run_forked(PACKAGE, [script.format(one.split()) for one in words], folders)


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
    done = mmseg_sats(*commands)
    failed = [(words, one.stderr[-2000:]) for (_, words), one in zip(commands, done, strict=True) if one.returncode]
    assert not failed
    assert 'no photographs' not in (run / 'report/index.html').read_text()
    assert (elsewhere / 'attention.png').is_file()
    assert len(json.loads((run / 'test/test.json').read_text())) == 1
    assert 'plain_pyramid_shapes_3-3' in done[-1].stdout
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
    for one in mmseg_sats(*((tmp_path, words) for words in commands)):
        assert one.returncode == 1
        assert one.stderr.count('\n') == 1, one.stderr
        assert 'Python finds no module plain_pyramid' in one.stderr
        assert f'nor is it in {stage if str(stage) in one.stderr else reader}, ' in one.stderr

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""`mmseg-sats table --configs DIR`: which of a user's files are rows, how their runs are called, one table trained."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmseg.registry import DATASETS

from mmseg_sats import commands
from mmseg_sats.engine.experiments.own_configs import find_configs, own_cells
from mmseg_sats.engine.experiments.plan import Run
from mmseg_sats.engine.experiments.record import Record
from mmseg_sats.engine.experiments.tables import TABLES

ROOT = Path(__file__).parents[1]
SHAPES = "_base_ = ['mmseg_sats::_base_/segformer_tiny_shapes.py', 'mmseg_sats::{0}/{0}.py']\nprotocol = '{1}'\n"
HOOK = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class QuietHook(Hook):
    def after_stage(self, runner, stage, metrics):
        print('quiet stage', stage.index)
"""
Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file below the current folder."""
    monkeypatch.chdir(tmp_path)

    def file(name: str, text: str) -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)

    return file


def test_every_config_of_a_run_is_a_row_and_nothing_else_is_run(write: Write) -> None:
    write('own/cosine/cosine.py', "segmentation_loss = dict(type='CrossEntropyLoss')\n")
    write('own/cosine/shapes_3-1.py', SHAPES.format('mib', '3-1'))
    write('own/cosine/shapes_3-3.py', SHAPES.format('mib', '3-3') + 'memory = 12\n')
    write('own/all.py', SHAPES.format('joint', 'joint') + "split = '3-1'\nmethod = 'together'\n")
    write('own/base.py', "_base_ = 'mmseg_sats::_base_/segformer_tiny_shapes.py'\n")
    write('own/a_loss.py', "_base_ = model = 1\nimport os\nraise RuntimeError('is a module')\n")
    write('own/work_dirs/run/config.py', SHAPES.format('mib', '3-1'))
    write('own/work_dirs/run/stage_0/config.py', SHAPES.format('mib', '3-1'))
    write('own/.hidden/x.py', SHAPES.format('mib', '3-1'))
    configs, notes = find_configs(Path('own'))
    found = {one.name: (one.method, one.dataset, one.protocol, one.joint, one.memory) for one in configs}
    assert found == {
        'all': ('together', 'shapes', '3-1', True, 0),
        'cosine/shapes_3-1': ('cosine', 'shapes', '3-1', False, 0),
        'cosine/shapes_3-3': ('cosine', 'shapes', '3-3', False, 12),
    }
    (note,) = notes
    assert note.startswith(f'{Path("own/base.py").absolute()} is a part that configs inherit from: ')
    assert "the config defines no 'pseudo_labeler'" in note


def test_runs_are_named_by_their_files(write: Write) -> None:
    write('own/cosine/shapes.py', SHAPES.format('mib', '3-1') + 'memory = 12\n')
    write('own/all.py', SHAPES.format('joint', 'joint') + "split = '3-1'\n")
    configs, _ = find_configs(Path('own'))

    def names(memories: list[int] | None, seeds: list[int]) -> list[str]:
        return [run.name for cell in own_cells(configs, memories, seeds, ['epochs=2']) for run in cell.runs]

    assert names(None, [0, 1]) == ['all_seed0', 'all_seed1', 'cosine_shapes_seed0', 'cosine_shapes_seed1']
    assert names([0, 30], [0]) == ['all_seed0', 'cosine_shapes_memory0_seed0', 'cosine_shapes_memory30_seed0']
    (run,) = own_cells(configs, None, [3], ['epochs=2', 'outside_root=x'])[1].runs
    cfg = run.load()
    assert run.options == ('epochs=2', 'seed=3', 'memory=12')
    assert (cfg.epochs, cfg.seed, cfg.memory, cfg.method) == (2, 3, 12, 'cosine')


def test_a_config_in_the_current_folder_has_the_same_method_as_from_elsewhere(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write('own/one.py', SHAPES.format('mib', '3-1'))
    there, _ = find_configs(Path('own'))
    monkeypatch.chdir('own')
    assert find_configs(Path('.')) == (there, [])
    assert there[0].method == 'own'


def test_a_config_with_a_base_of_its_own_takes_no_other_stage_0(write: Write) -> None:
    write('own/yard.py', SHAPES.format('mib', '3-1') + "base = 'old/model.pth'\n")
    record = Record(Path('out'), Run('yard_seed0', Path('own/yard.py'), ()))
    assert record.find_start() is None
    Path('out/yard_seed0').mkdir(parents=True)
    for base, told in (('old/model.pth', ''), ('other.pth', 'base: other.pth there, old/model.pth asked')):
        cfg = record.run.load()
        cfg.base, cfg.work_dir = base, 'out/yard_seed0'
        cfg.dump('out/yard_seed0/config.py')
        os.utime('out/yard_seed0/config.py', ns=(0, len(base)))  # a file of another time is read anew
        assert record.conflict() == told


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ([], f'expected a table ({", ".join(TABLES)}), or --configs DIR'),
        (['table1', '--configs', 'own'], 'or --configs DIR with configs of your own'),
        (['--configs', 'none'], '--configs none does not exist: expected a folder of configs'),
        (['--configs', 'empty'], 'expected configs of runs in it, with a model, a method and a protocol; found none'),
        (['--configs', 'two'], "several data sets: expected one of ['mine', 'shapes'] by --dataset"),
        (['--configs', 'own', '--dataset', 'voc'], "--dataset='voc' is unknown"),
        (['--configs', 'own', '--protocols', '3-2'], "--protocols='3-2' is unknown"),
        (['--configs', 'own', '--methods', 'mibb'], "did you mean 'mib'?"),
        (['--configs', 'own', '--variants', 'x'], '--variants x: the rows of configs are systems'),
        (['--configs', 'two', '--dataset', 'mine', '--methods', 'mib'], "no configs for the data set 'mine'"),
        (['--configs', 'two', '--dataset', 'mine', '--memory', 'both'], 'there is no usual number for mine'),
        (['--configs', 'own', '--cfg-options', 'epoch=3'], "none of the configs has 'epoch' (did you mean 'epochs'?)"),
        (['--configs', 'same'], 'would both be trained in a_b_seed0: rename one'),
        (['--configs', 'wrong'], 'no_such_module'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_anything_is_trained(write: Write, words: list[str], message: str) -> None:
    shapes = SHAPES.format('mib', '3-1')
    write('own/one.py', shapes)
    write('empty/base.py', "_base_ = 'mmseg_sats::_base_/segformer_tiny_shapes.py'\n")
    for name in ('two/one.py', 'same/a/b.py', 'same/a_b.py'):
        write(name, shapes)
    write('two/another.py', f"{shapes}dataset = 'mine'\n")
    write('wrong/one.py', f"{shapes}method_imports = ['no_such_module']\n")
    with pytest.raises(SystemExit) as told:
        commands.main(['table', *words])
    assert message in str(told.value)
    assert '\n' not in str(told.value)
    assert not Path('work_dirs').exists()


PAGE = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/folders.md').read_text(), re.DOTALL)
# The page's config of the data, with a network and crops that a test can afford.
RECIPE = f"""{PAGE[0]}
pretrained = None
crop_size = 64
epochs = 1
model = dict(
    backbone=dict(embed_dims=16, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=32))
"""


def draw_street(shapes_root: Path) -> None:
    """The folders of the page, with images of as many classes."""
    shapes = dict(type='ShapesDataset', data_root=str(shapes_root), num_classes=5, num_images=12, image_size=64)
    for split in ('train', 'val'):
        info = DATASETS.build(dict(shapes, split=split)).get_data_info(0)
        for kind, key in (('images', 'img_path'), ('masks', 'seg_map_path')):
            shutil.copytree(Path(info[key]).parent, f'data/street/{kind}/{split}')


def test_every_method_runs_on_a_data_set_of_the_user_s(
    write: Write, shapes_root: Path, capsys: pytest.CaptureFixture
) -> None:
    draw_street(shapes_root)
    write('street.py', RECIPE)
    write('sats_street.py', PAGE[1])
    words = ['table', 'table1', '--dataset', 'street.py', '--report']
    assert commands.main(words) == 0
    printed = capsys.readouterr().out
    methods = [line.split('|')[1].strip() for line in printed.splitlines() if '0 of 1 (not run)' in line]
    assert ' '.join(methods) == (
        'joint finetune finetune_frozen lwf lwf_mc ilt mib plop sdr ssul sats '
        'barm cit crls dft dkd ewf lgkd mbs nest rcil reminder sats_plus star ucd'
    )
    assert 'left out: recall needs images from outside: --cfg-options outside_root=FOLDER' in printed
    assert 'paper' not in printed
    for method in ('joint', 'lwf_mc', 'sdr', 'ssul', 'sats'):
        path = Path(f'work_dirs/street/configs/{method}/own_street_3-1.py')
        cfg = Config.fromfile(path)
        cfg.work_dir, cfg.seed = f'work_dirs/street/{method}', 0
        RUNNERS.build(cfg)  # all checks before training
        kept = ('joint', '3-1') if method == 'joint' else ('3-1', None)
        assert (cfg.protocol, cfg.get('split')) == kept
    alone = Config.fromfile('sats_street.py')
    alone.work_dir = 'work_dirs/alone'
    assert RUNNERS.build(alone).cfg.method == 'sats'
    written = path.stat().st_mtime_ns
    write('street.py', f'{RECIPE}memory = 12\n')
    more = ['--methods', 'recall,sats', '--protocols', '4-1', '--cfg-options', 'outside_root=data/street/images/val']
    assert commands.main([*words, *more]) == 0
    rows = [line.split('|')[1:3] for line in capsys.readouterr().out.splitlines() if 'not run' in line]
    assert [[cell.strip() for cell in row] for row in rows] == [['recall', '-'], ['sats', '-'], ['recall', '12'],
                                                                ['sats', '12']]  # fmt: skip
    assert path.stat().st_mtime_ns == written  # what is there already stays


@pytest.mark.parametrize(
    ('text', 'words', 'message'),
    [
        (None, [], '--dataset street.py does not exist'),
        ("_base_ = 'mmseg_sats::_base_/datasets/folders.py'\n", [], 'has no model, train_dataloader, optim_wrapper'),
        (RECIPE.replace("'3-1'", 'None'), [], 'has protocol=None: expected m-n in it or by --protocols'),
        (RECIPE + 'distillation = dict()\n', [], 'has distillation of a method'),
        (RECIPE, ['--memory', 'both'], 'there is no usual number for street'),
        (RECIPE, ['--methods', 'mibb'], "did you mean 'mib'?"),
    ],
)
def test_what_is_wrong_with_such_a_config_is_told(
    write: Write, text: str | None, words: list[str], message: str
) -> None:
    if text is not None:
        write('street.py', text)
    with pytest.raises(SystemExit) as told:
        commands.main(['table', 'table1', '--dataset', 'street.py', *words])
    assert message in str(told.value)
    assert '\n' not in str(told.value)


def test_one_table_of_own_configs_and_a_method_of_the_package(
    write: Write, tmp_path: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With a module of the user's, which the planning process and the trained runs find."""
    write('own/quiet/a_hook.py', HOOK)
    method = "method_imports = ['a_hook']\nmethod_hooks = [dict(type='QuietHook')]\n"
    write('own/quiet/shapes_3-1.py', SHAPES.format('mib', '3-1') + method)
    small = [
        f'data_root={shapes_root}', 'epochs=1', 'num_shapes=4', 'image_size=64', 'crop_size=64', 'train_images=24',
        'val_images=12', 'batch_size=4', 'train_dataloader.num_batch_per_epoch=1', 'report=None',
        'rehearsal=None',
    ]  # fmt: skip
    words = ['table', '--configs', 'own', '--threads', '1', '--cfg-options', *small]
    monkeypatch.setenv('PYTHONPATH', str(ROOT))  # the package that is tested, in the runs too
    code = commands.main(words)
    printed = capsys.readouterr().out
    out = tmp_path / 'work_dirs/shapes'
    logs = ''.join(path.read_text()[-2000:] for path in out.glob('*/log.txt'))
    assert code == 0, printed + logs
    assert 'quiet stage 1' in (out / 'quiet_shapes_3-1_seed0/log.txt').read_text()
    assert commands.main([*words[:3], '--methods', 'finetune', '--report', *words[3:]]) == 0
    printed = capsys.readouterr().out
    head, _, *rows = [line.split('|')[1].strip() for line in printed.splitlines() if line.startswith('|')]
    assert [head, *rows] == ['row', 'stage 0 as it was', 'quiet/shapes_3-1', 'finetune']
    assert (out / 'configs.md').read_text() in printed
    table = (out / 'configs.csv').read_text()
    assert (table.count('finished'), table.count('not run')) == (2, 1)

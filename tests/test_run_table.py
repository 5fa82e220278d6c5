# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""tools/run_table.py from end to end, a few iterations each."""

import csv
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.config import Config

from mmseg_sats.engine.experiments.unchanged import representatives
from mmseg_sats.visualization.stage_model import eval_dataset, load_stage

ROOT = Path(__file__).parents[1]
Main = Callable[..., int]


@pytest.fixture(scope='module')
def main() -> Main:
    spec = importlib.util.spec_from_file_location('run_table', ROOT / 'tools/run_table.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: module.main([str(word) for word in words])


@pytest.fixture(scope='module')
def words(shapes_root: Path) -> list[str]:
    return [
        f'data_root={shapes_root}', 'epochs=1', 'num_shapes=4', 'image_size=64', 'crop_size=64',
        'train_images=24', 'val_images=12', 'batch_size=4', 'train_dataloader.num_batch_per_epoch=1',
        'report=None', 'rehearsal=None',
    ]  # fmt: skip


@pytest.fixture(scope='module')
def trained(main: Main, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work dir with SATS and FT on 3-1 with four classes: two stages each."""
    out = tmp_path_factory.mktemp('tables')
    patch = pytest.MonkeyPatch()
    # The package that is tested, in the children too.
    patch.setenv('PYTHONPATH', str(ROOT))
    options = ['--out', out, '--threads', 1, '--cfg-options', *words]
    code = main('table1', '--dataset', 'shapes', '--methods', 'sats,finetune', '--memory', 'none', *options)
    patch.undo()
    logs = ''.join(path.read_text()[-2000:] for path in out.glob('*/log.txt'))
    assert code == 0, logs
    return out


def call(main: Main, out: Path, words: list[str], *more: str) -> int:
    options = ['--dataset', 'shapes', '--memory', 'none', '--out', out, *more]
    return main('table1', '--methods', 'sats,finetune', *options, '--cfg-options', *words)


def times(out: Path) -> dict[Path, int]:
    """When each file of the runs was written."""
    return {path: path.stat().st_mtime_ns for path in out.glob('*_seed*/**/*') if path.is_file()}


def test_both_runs_are_whole_and_share_stage_0(trained: Path) -> None:
    start = trained / 'sats_3-1_seed0/stage_0/snapshot.pth'
    assert Config.fromfile(trained / 'sats_3-1_seed0/config.py').base is None
    assert Config.fromfile(trained / 'finetune_3-1_seed0/config.py').base == str(start)
    one, other = (
        json.loads((trained / f'{method}_3-1_seed0/results.json').read_text())
        for method in ('sats', 'finetune')
    )
    assert len(one['stages']) == len(other['stages']) == 2
    assert one['stages'][0]['iou'] == other['stages'][0]['iou']
    assert (one['method'], other['method']) == ('sats', 'finetune')


def test_the_second_call_trains_nothing(
    main: Main, trained: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = times(trained)
    assert call(main, trained, words) == 0
    assert times(trained) == before
    printed = capsys.readouterr().out
    assert 'started' not in printed
    assert printed.count('1 of 1') == 3
    assert 'evaluating' not in printed


def test_the_table_says_what_results_json_says(
    main: Main, trained: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(main, trained, words, '--report') == 0
    printed = capsys.readouterr().out
    written = (trained / 'table1.md').read_text()
    assert written in printed
    with (trained / 'table1.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['run'] for row in rows] == ['sats_3-1_seed0'] * 2 + ['finetune_3-1_seed0']
    for row in rows[1:]:
        results = json.loads((trained / row['run'] / 'results.json').read_text())
        final = results['final'] | {key: results[key] for key in ('average_all', 'forgetting')}
        assert {key: float(row[key]) for key in final} == final
        split = ([word.strip() for word in line.strip('|').split('|')] for line in written.splitlines())
        cells = next(cells for cells in split if cells[0] == row['method'])
        assert cells[2:8] == [f'{value:.2f}' for value in final.values()]


def test_stage_0_as_it_was_is_the_first_row(main: Main, trained: Path, words: list[str]) -> None:
    """On the images of the last stage; the classes learned since have 0."""
    assert call(main, trained, words, '--report') == 0
    with (trained / 'table1.csv').open() as file:
        row = next(csv.DictReader(file))
    assert (row['row'], row['method'], row['state']) == ('stage 0 as it was', 'stage_0', 'finished')
    run = trained / 'sats_3-1_seed0'
    last = load_stage(run / 'stage_1', 'cpu')
    first = load_stage(run / 'stage_0', 'cpu')
    counts = np.zeros((5, 5))
    for sample in eval_dataset(last.cfg):
        label, predicted = sample['data_samples'].gt_sem_seg.data[0].numpy(), np.asarray(first.predict(sample))
        for true in range(5):
            for said in range(5):
                counts[true, said] += ((label == true) & (predicted == said)).sum()
    iou = 100 * counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    assert iou[4] == 0
    assert [float(row[key]) for key in ('base', 'new', 'all', 'hIoU')] == pytest.approx(
        [iou[:4].mean(), 0, iou.mean(), 0], abs=1e-4
    )
    assert row['average_all'] == row['forgetting'] == row['train_seconds'] == ''


def test_one_run_for_each_stage_0(tmp_path: Path) -> None:
    """Of a base of the user's too, wherever its file is, and of each set of classes."""
    def record(name: str, base: str | None, num_classes: int = 5, num_stages: int = 2) -> SimpleNamespace:
        return SimpleNamespace(
            folder=tmp_path / name, base=lambda: base and Path(base), conflict=lambda: '', results=lambda: {},
            asked=SimpleNamespace(num_classes=num_classes, num_stages=num_stages),
        )  # fmt: skip

    joint, own = record('joint', None, num_stages=1), record('own', None)
    shared = record('shared', f'{tmp_path}/own/stage_0/snapshot.pth')
    given, again, other = record('given', 'model.pth'), record('again', 'model.pth'), record('other', 'other.pth')
    more = record('more', 'model.pth', num_classes=7)
    found = representatives([joint, own, shared, given, again, other, more])
    assert list(found.values()) == [own, given, other, more]


def test_a_stage_0_that_cannot_be_evaluated_is_named_and_the_table_is_there(
    main: Main, trained: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / 'tables')
    run = tmp_path / 'tables/sats_3-1_seed0'
    shutil.rmtree(run / 'unchanged')
    (run / 'stage_0/snapshot.pth').write_bytes(b'')
    assert call(main, tmp_path / 'tables', words) == 0
    printed = capsys.readouterr().out
    assert f'stage 0 as it was could not be evaluated, see {run}/unchanged/log.txt' in printed
    assert 'stage_0/snapshot.pth' in (run / 'unchanged/log.txt').read_text()
    assert printed.count('1 of 1') == 2


def test_another_option_is_noticed(
    main: Main, trained: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = times(trained)
    assert call(main, trained, [*words, 'epochs=2']) == 1
    assert times(trained) == before
    printed = capsys.readouterr().out
    assert f'{trained}/sats_3-1_seed0 holds another run (epochs: 1 there, 2 asked)' in printed
    assert printed.count('0 of 1 (another run)') == 2


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['tabel1'], "table='tabel1' is unknown (did you mean 'table1'?)"),
        (['table1', '--dataset', 'vocmini'], "did you mean 'voc_mini'?"),
        (['table1', '--methods', 'sats,plopp'], "'plopp' is unknown (did you mean 'plop'?)"),
        (['table3', '--methods', 'mib'], '--methods mib: the rows of table3 are variants of SATS'),
        (['ablations', '--variants', 'without_atention'], "(did you mean 'without_attention'?)"),
        (['table1', '--variants', 'eq2'], '--variants eq2: the rows of table1 are systems, named by --methods'),
        (['table1', '--jobs', '0'], '--jobs 0: expected 1 or more'),
        (['table1', '--memory', 'al'], "--memory='al' is unknown"),
        (['table1', '--cfg-options', 'seed=3'], '--cfg-options seed=...: it names the runs; give it by --seeds'),
        (['table1', '--cfg-options', 'method=mib'], 'method=...: it names the runs; give it by --methods'),
        (['table1', '--cfg-options', 'dataset=voc'], 'dataset=...: it names the runs; give it by --dataset'),
        (['table1', '--methods', 'sats', '--cfg-options', 'epochs'], '--cfg-options epochs: expected KEY=VALUE'),
        (['table1', '--dataset', 'voc', '--methods', 'sats', '--cfg-options', 'data_root=/none'],
         "/none/JPEGImages does not exist (data_root='/none'"),
        (['table1', '--dataset', 'shapes', '--methods', 'sats', '--cfg-options', 'train_cfg.max_epochs=$epoch'],
         "the config defines no 'epoch' (did you mean 'epochs'?)"),
        (['table1', '--dataset', 'shapes', '--write-split', 'x'], 'has no train_list'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_trained(
    main: Main, argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as told:
        main(*argv)
    assert message in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_method_is_named_and_the_rest_reported(
    main: Main, trained: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ['--dataset', 'shapes', '--memory', 'none', '--protocols', '3-1,2-1', '--out', trained]
    assert main('table1', '--methods', 'sats', *options, '--report', '--cfg-options', *words) == 0
    printed = capsys.readouterr().out
    assert 'left out: configs/sats/segformer_tiny_shapes_2-1.py does not exist' in printed
    assert 'no config' in printed
    assert '1 of 1' in printed


def test_a_table_without_any_run_is_not_written(
    main: Main, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ['--dataset', 'shapes', '--memory', 'none', '--protocols', '2-1', '--out', tmp_path]
    assert main('table1', '--methods', 'sats', *options, '--cfg-options', *words) == 1
    assert 'no table is written' in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []

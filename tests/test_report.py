# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The report: every number on the page is the run's, and nothing on it comes from elsewhere."""

import base64
import copy
import json
import logging
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.config import Config

from mmseg_sats.engine.files.run_report import report_at_end
from mmseg_sats.visualization import panel, theme
from mmseg_sats.visualization.report import curves, heatmap, losses
from mmseg_sats.visualization.report.page import (
    check_report_options,
    write_report,
    write_run_report,
)
from mmseg_sats.visualization.report.run_record import (
    config_differences,
    dotted_keys,
    find_sweeps,
    load_runs,
    run_labels,
)
from mmseg_sats.visualization.stage_model import eval_dataset, load_stage
from tools.report import main

PICTURES = ['costs', 'iou_by_class_0', 'losses_0', 'miou_by_stage', 'old_and_new', 'photographs']


class Page(HTMLParser):
    """The marked numbers of a page, its other text, and all addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers: list[tuple[dict[str, str], str]] = []
        self.rest = ''
        self.addresses: list[str] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or '' for name, value in attributes}
        self.addresses += [given[name] for name in ('src', 'srcset', 'href') if name in given]
        if tag in ('data', 'code', 'style', 'title', 'h1', 'h3', 'th'):
            self._open.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, text: str) -> None:
        tag, given = self._open[-1] if self._open else ('', {})
        if tag == 'data':
            self.numbers.append((given, text))
        elif tag == '':
            self.rest += text


@pytest.fixture(scope='module')
def report(tiny_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the report of both runs."""
    out = tmp_path_factory.mktemp('report')
    write_report(tiny_runs, out, images=2, attention=1)
    return out


def stored(run: Path, key: str) -> Any:
    """The number that a key of the page stands for, read from the run's files alone."""
    source, *path = key.split('/')
    if source == 'results':
        value = json.loads((run / 'results.json').read_text())
        for name in path:
            value = value[int(name) if isinstance(value, list) else name]
        return value
    stage = run / f'stage_{path[0]}'
    if source == 'metrics':
        return json.loads((stage / 'metrics.json').read_text())[path[1]]
    (file,) = stage.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    if source == 'memory':  # on a GPU alone
        return max(line['memory'] for line in lines)
    return float(np.mean([line[path[1]] for line in lines]))


def test_every_number_on_the_page_is_the_runs(report: Path, tiny_runs: list[Path]) -> None:
    page = Page((report / 'index.html').read_text())
    seen = set()
    for given, text in page.numbers:
        expected = stored(tiny_runs[int(given['data-run'])], given['data-key'])
        assert float(given['value']) == pytest.approx(expected, rel=1e-12), given
        digits = len(text.partition('.')[2])
        assert text == f'{float(given["value"]):.{digits}f}', given
        seen.add((given['data-run'], given['data-key']))
    assert not re.search(r'\d+\.\d+', page.rest), 'a number that is not marked'
    # None of the run's figures is missing.
    for i, run in enumerate(tiny_runs):
        results = json.loads((run / 'results.json').read_text())
        for path, value in dotted_keys({k: results[k] for k in ('final', 'average_all', 'forgetting')}).items():
            assert value is None or (str(i), f'results/{path.replace(".", "/")}') in seen
        for k, stage in enumerate(results['stages']):
            for name, value in stage['iou'].items():
                assert value is None or (str(i), f'results/stages/{k}/iou/{name}') in seen


def test_the_page_needs_nothing_from_outside(report: Path) -> None:
    text = (report / 'index.html').read_text()
    addresses = Page(text).addresses
    assert addresses
    assert all(address.startswith('data:image/') for address in addresses)
    assert 'url(' not in text
    assert '<li><span class="swatch" style="background:transparent"></span>background: the photograph as it is' in text
    assert '<script' not in text
    for address in addresses:
        kind, _, content = address.partition(';base64,')
        if 'svg' in kind:
            svg = base64.b64decode(content).decode()
            assert '://' not in re.sub(r'xmlns(:\w+)?="[^"]*"', '', svg)
            assert not re.findall(r'href="(?!#|data:)', svg)


def test_pictures_stand_beside_the_page(report: Path) -> None:
    names = {path.name for path in report.iterdir()}
    expected = {f'{name}.{suffix}' for name in PICTURES for suffix in ('png', 'pdf')}
    assert expected | {'index.html', 'attention_0.png', 'losses_1.pdf'} <= names
    assert (report / 'photographs.pdf').read_bytes().startswith(b'%PDF')


def test_both_pages_are_there_in_their_colours(report: Path) -> None:
    pictures = re.findall(r'srcset="([^"]+)"><img src="([^"]+)"', (report / 'index.html').read_text())
    assert len(pictures) >= 7
    for dark, light in pictures:
        dark, light = (base64.b64decode(uri.partition(',')[2]).decode() for uri in (dark, light))
        assert theme.DARK[theme.INK] in dark
        assert theme.INK not in dark
        assert theme.recolour(light) == dark


def test_a_run_writes_its_report_by_itself(tiny_runs: list[Path]) -> None:
    assert (tiny_runs[0] / 'report/index.html').is_file()
    assert (tiny_runs[0] / 'report/photographs.png').is_file()
    assert not (tiny_runs[1] / 'report').exists()  # report=None


def test_a_report_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(
        'mmseg_sats.visualization.report.page.print_log', lambda text, level, **_: told.append((text, level))
    )
    assert write_run_report(tmp_path, {}) is None
    ((text, level),) = told
    assert 'results.json does not exist' in text
    assert level == logging.WARNING
    report_at_end(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_data_weights_and_modules_that_moved_are_named_on_the_page_and_in_the_log(
    tiny_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr('mmseg_sats.visualization.report.page.print_log', lambda text, **_: told.append(text))
    run = tmp_path / 'run'
    shutil.copytree(tiny_runs[0], run)
    (run / 'stage_1/snapshot.pth').unlink()
    text = write_report([run], tmp_path / 'out').read_text()
    assert 'snapshot.pth does not exist' in text
    assert 'class="tiles"' not in text
    shutil.copy(tiny_runs[0] / 'stage_1/snapshot.pth', run / 'stage_1')
    config = run / 'stage_1/config.py'
    config.write_text(config.read_text().replace("type='ShapesDataset'", "type='LostDataset'"))
    assert 'No photographs: the evaluation data' in write_report([run], tmp_path / 'out').read_text()
    config.write_text(config.read_text().replace("'mmseg_sats'", "'mmseg_sats', 'a_lost_module'", 1))
    assert 'finds no module a_lost_module' in write_report([run], tmp_path / 'out').read_text()
    assert ['snapshot.pth' in told[0], 'No photographs' in told[1], 'a_lost_module' in told[2]] == [True] * 3


def test_options_are_checked_before_training() -> None:
    assert check_report_options(dict(images=1)) == dict(images=1, attention=2)
    with pytest.raises(ValueError, match=r"report='image'.*did you mean 'images'"):
        check_report_options(dict(image=1))
    with pytest.raises(ValueError, match=r'report.images=-1'):
        check_report_options(dict(images=-1))


def test_a_folder_without_a_run_names_the_runs_in_it(tiny_runs: list[Path]) -> None:
    with pytest.raises(SystemExit, match=r'it holds the runs .*finetune, .*sats'):
        main([str(tiny_runs[0].parent)])


def test_of_many_runs_in_a_folder_three_are_named(tmp_path: Path) -> None:
    for name in 'abcde':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'results.json').touch()
    with pytest.raises(SystemExit, match=r'it holds the runs a, b, c and 2 more: name those, as in .*/\*'):
        main([str(tmp_path)])


def test_the_pictures_draw_the_runs_figures(tiny_runs: list[Path]) -> None:
    runs = load_runs(tiny_runs)
    with theme.style():
        curve = curves.draw_curves(runs).axes[0].lines[0]
        cells = heatmap.draw_heatmap(runs[0], {}).axes[0]
        bars = curves.draw_old_new(runs).axes[0].containers[0]
    assert curve.get_xdata().tolist() == [3, 6]
    stages = runs[0].results['stages']
    assert curve.get_ydata().tolist() == [stage['mIoU']['all'] for stage in stages]
    texts = [text.get_text() for text in cells.texts]
    expected = [
        f'{stage["iou"][name]:.0f}'
        for name in runs[0].class_names
        for stage in stages
        if stage['iou'].get(name) is not None
    ]
    assert texts == expected
    assert [bar.get_width() for bar in bars] == [run.results['final']['all'] for run in runs]


def test_losses_follow_each_other_on_one_axis(tiny_runs: list[Path]) -> None:
    (run,) = load_runs(tiny_runs[:1])
    names = losses.loss_names(run)
    assert names == ['decode.loss_ce', 'loss_attention', 'loss_output']
    iterations, values, ends = losses.loss_series(run.stages, names)
    assert (np.diff(iterations) > 0).all()
    assert ends[-1] == iterations[-1]
    totals = [line['loss'] for stage in run.stages for line in stage.scalars]
    np.testing.assert_allclose(values.sum(0), totals, rtol=1e-5)
    assert values[1, iterations <= ends[0]].sum() == 0  # stage 0 has nothing to distil


def test_photographs_are_the_same_for_all_runs(tiny_runs: list[Path]) -> None:
    models = {run.name: load_stage(run / 'stage_1') for run in tiny_runs}
    dataset = eval_dataset(models['sats'].cfg)
    samples = panel.panel_samples(dataset, 2)
    rows = panel.panel_rows(models, samples)
    for row, sample in zip(rows, samples, strict=True):
        assert list(row.tiles) == ['image', 'truth', 'sats', 'finetune']
        assert {tile.shape for tile in row.tiles.values()} == {(64, 64, 3)}
        labels = sample['data_samples'].gt_sem_seg.data[0]
        assert row.ignored == bool((labels == 255).any())
        assert set(row.classes) == {models['sats'].classes[c] for c in labels.unique() if c > 0}


def test_chosen_images_show_every_class() -> None:
    presence = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    assert panel.choose_images(presence, 2) == [1, 3]
    assert panel.choose_images(presence, 3) == [1, 3, 2]
    assert sorted(panel.choose_images(presence, 9)) == [0, 1, 2, 3]


def test_chosen_images_are_no_neighbours() -> None:
    video = np.ones((40, 5), bool)  # frames that show the same
    chosen = panel.choose_images(video, 4)
    assert min(abs(a - b) for a in chosen for b in chosen if a != b) >= 5
    video[17:19, 3:] = False
    video[:16, 3] = video[24:, 3] = False
    assert {*range(16, 24)} & set(panel.choose_images(video, 2))  # what few frames show comes before


def test_runs_can_be_told_apart() -> None:
    lines = [theme.series_style(i) for i in range(24)]
    assert len({line['color'] for line in lines[:12]}) == len({line['marker'] for line in lines[:12]}) == 12
    assert len({(line['color'], line['linestyle']) for line in lines}) == 24
    bars = [theme.bar_style(i) for i in range(24)]
    assert len({(bar['color'], bar['hatch']) for bar in bars}) == 24
    assert {bar['hatch'] for bar in bars[:6]}.isdisjoint({bar['hatch'] for bar in bars[6:12]})
    colours = {theme.DARK[colour] for colour in theme.SERIES}
    assert len(colours) == 12
    assert colours.isdisjoint(theme.DARK)  # no colour is replaced twice


def test_a_page_of_many_runs(tiny_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = theme.Picture('any', '<svg/>', '<svg/>', 'any')  # the pictures themselves are drawn by other tests
    monkeypatch.setattr('mmseg_sats.visualization.report.pictures.Album.draw', lambda *_: drawn)
    folders = []
    for name, weight in (('a', 5.0), ('b', 20.0), ('c', 80.0), ('d', None), ('e', None)):
        folder = tmp_path / name
        shutil.copytree(tiny_runs[0] if weight else tiny_runs[1], folder)
        cfg = Config.fromfile(folder / 'config.py')
        if weight:
            cfg.merge_from_dict({'distillation.attention.loss_weight': weight})
        cfg.dump(folder / 'config.py')
        folders.append(folder)
    results = json.loads((folders[3] / 'results.json').read_text())
    results['stages'][1]['iou']['background'] = None
    results['final']['base'] = None
    (folders[3] / 'results.json').write_text(json.dumps(results))
    text = write_report(folders, tmp_path / 'out', images=0, attention=0).read_text()
    assert '<h1>5 runs</h1>' in text
    assert text.count('means over 6 of 7 (without background)') == 1  # beside the run's name
    assert text.count('<th class="text">means over</th>') == 1  # of that run's stages
    (sweep,) = re.findall(r'<h2>One value varied: (\w+)</h2>', text)
    assert sweep == 'sats'
    assert '<code>distillation.attention.loss_weight</code> of sats (a), sats (b), sats (c).' in text


def test_labels_say_what_differs() -> None:
    def run(**changes: Any) -> dict[str, Any]:
        keys = dict(method='sats', dataset='voc', protocol='15-1', setting='overlapped', memory=0, seed=0)
        return keys | changes

    assert run_labels([run(), run(method='plop', seed=1)], ['a', 'b']) == ['sats', 'plop']
    assert run_labels([run(), run(seed=1)], ['a', 'b']) == ['sats seed 0', 'sats seed 1']
    assert run_labels([run(), run(memory=100)], ['a', 'b']) == ['sats', 'sats memory 100']
    assert run_labels([run(), run()], ['a', 'b']) == ['sats (a)', 'sats (b)']
    assert len(set(run_labels([run(), run()], ['a', 'a']))) == 2


def test_sweeps_are_found_where_one_number_differs(tiny_runs: list[Path], tmp_path: Path) -> None:
    folders = []
    for name, weight, seed in (('a', 5.0, 0), ('b', 20.0, 0), ('c', 20.0, 1)):
        folder = tmp_path / name
        folder.mkdir()
        results = json.loads((tiny_runs[0] / 'results.json').read_text()) | dict(seed=seed)
        results['final'] = results['final'] | dict(all=weight + seed)
        (folder / 'results.json').write_text(json.dumps(results))
        cfg = Config.fromfile(tiny_runs[0] / 'config.py')
        changes = {'distillation.attention.loss_weight': weight, 'seed': seed, 'work_dir': name}
        cfg.merge_from_dict(copy.deepcopy(changes))
        (folder / 'config.py').write_text(cfg.pretty_text)
        folders.append(folder)
    runs = load_runs(folders)
    (sweep,) = find_sweeps(runs)
    assert sweep.key == 'distillation.attention.loss_weight'
    assert [value for value, _ in sweep.points] == [5.0, 20.0, 20.0]
    assert set(config_differences(runs)) == {sweep.key, 'seed'}
    with theme.style():
        lines = curves.draw_sweep(sweep).axes[0].lines
    assert lines[1].get_ydata().tolist() == [5.0, 20.5]  # the mean over the seeds
    for run in runs:
        run.results['final']['new'] = None  # as of joint training: two groups are left
    with theme.style():
        labels = [text.get_text() for text in curves.draw_sweep(sweep).legends[0].get_texts()]
    assert labels == ['all classes', 'base classes']
    other = load_runs([folders[0], tiny_runs[1]])
    assert find_sweeps(other) == []

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The diagnosis of runs that were made to forget in a known way."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import DATASETS
from torch import Tensor, nn

from mmseg_sats.commands import main
from mmseg_sats.datasets.incremental_dataset import NoImagesError
from mmseg_sats.datasets.memory.replay import stage_dataset_cfg
from mmseg_sats.engine.diagnosis.classifier_rows import NotMeasurableError, classifier_rows
from mmseg_sats.engine.diagnosis.diagnose import diagnose
from mmseg_sats.engine.diagnosis.images import some, training_images
from mmseg_sats.engine.diagnosis.kept_attention import KeptAttention
from mmseg_sats.engine.diagnosis.oracle import add_moments, fit_oracle, oracle_in_place, oracle_rows
from mmseg_sats.engine.diagnosis.pseudo_labels import labelled_as, quality
from mmseg_sats.engine.diagnosis.sentences import findings, worth
from mmseg_sats.engine.diagnosis.write import write_diagnosis
from mmseg_sats.models.heads.closed_form import ClosedFormClassifier
from mmseg_sats.visualization.attention_view import view_classes
from mmseg_sats.visualization.stage_model import eval_dataset, load_stage

BIAS, WEIGHT = 'decode_head.conv_seg.bias', 'decode_head.conv_seg.weight'
KNOWN, NEW = 'striped star', 'shaded triangle'  # those that the features of the small run tell apart best


def copied(run: Path, out: Path) -> Path:
    """The files of a run that a diagnosis needs."""
    for folder in sorted(run.glob('stage_*')):
        (out / folder.name).mkdir(parents=True)
        for name in ('config.py', 'snapshot.pth', 'pseudo_label_thresholds.json'):
            if (folder / name).is_file():
                shutil.copy(folder / name, out / folder.name)
    return out


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edits the weights of a snapshot."""
    snapshot = torch.load(folder / 'snapshot.pth', weights_only=False)
    edit(snapshot['state_dict'])
    torch.save(snapshot, folder / 'snapshot.pth')


@pytest.fixture(scope='module')
def skilled(tiny_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classifiers are the oracle's, so that they know as much as the features tell; read only."""
    run = copied(tiny_runs[1], tmp_path_factory.mktemp('skilled') / 'run')
    for folder in sorted(run.iterdir()):
        stage = load_stage(folder, 'cpu')
        images = training_images(stage.cfg)
        rows = fit_oracle(stage, images.dataset, images.seen).float()
        change(folder, lambda weights, rows=rows: weights.update(
            {WEIGHT: rows[:, :-1, None, None].contiguous(), BIAS: rows[:, -1].contiguous()}
        ))  # fmt: skip
    return run


@pytest.fixture(scope='module')
def figures(skilled: Path) -> list[dict]:
    """The figures of the skilled run's stages."""
    return list(diagnose(skilled, device='cpu'))


def texts(stages: list[dict], part: str) -> list[str]:
    return [finding['text'] for finding in findings(stages) if finding['part'] == part]


def test_the_command_writes_figures_and_a_page(
    tiny_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = copied(tiny_runs[0], tmp_path / 'run')
    (run / 'stage_2').mkdir()
    main(['diagnose', str(run), '--device', 'cpu'])
    told = json.loads((run / 'diagnosis.json').read_text())
    results = json.loads((tiny_runs[0] / 'results.json').read_text())
    assert [stage['iou'] for stage in told['stages']] == [stage['iou'] for stage in results['stages']]
    assert [stage['new_classes'] for stage in told['stages']] == [s['new_classes'] for s in results['stages']]
    effects = [finding['effect'] for finding in told['findings']]
    assert effects == sorted(effects, reverse=True)
    page = (run / 'diagnosis.html').read_text()
    out, err = capsys.readouterr()
    for sentence in told['largest']:
        assert sentence.replace("'", '&#39;') in page
        assert sentence in out
    assert told['largest']
    assert 'stage 1: pseudo-labels' in err
    assert 'stage_2 is left out: it has no snapshot.' in page
    assert 'Not measured after stage 0: there is no snapshot of a stage before.' in page
    assert not re.search(r'(?:src|href)=', page)


def test_nothing_is_lost_where_nothing_was_done(figures: list[dict]) -> None:
    """The classifier is the oracle, so both have the same figures."""
    for stage in figures:
        assert stage['iou'] == pytest.approx(stage['oracle']['iou'], abs=0.5)
        assert np.sum(stage['confusion']) == stage['images'] * 64 * 64
    assert figures[1]['left_out'] == dict(pseudo_labels='the method has no pseudo-labels')
    assert figures[1]['learned'][KNOWN] == 0
    assert figures[1]['learned'][NEW] == 1
    assert figures[0]['iou'][KNOWN] > 10


def test_what_learning_was_worth_is_told_against_stage_0_as_it_was(skilled: Path, figures: list[dict]) -> None:
    first, dataset = load_stage(skilled / 'stage_0', 'cpu'), eval_dataset(load_stage(skilled / 'stage_1', 'cpu').cfg)
    samples = [dataset[place] for place in range(len(dataset))]
    truth = np.stack([sample['data_samples'].gt_sem_seg.data[0].numpy() for sample in samples])
    predicted = np.stack([first.predict(sample).numpy() for sample in samples])
    expected = {}
    for channel, name in enumerate(figures[1]['classes']):
        own, known = predicted == channel, truth == channel
        expected[name] = 100 * (own & known).sum() / (own | known)[truth != 255].sum()
    assert figures[1]['unchanged'] == pytest.approx(expected)
    assert figures[1]['unchanged'][NEW] == 0
    assert figures[0]['unchanged'] is None
    assert worth(figures[:1]) == []
    means = [sum(values.values()) / len(values) for values in (figures[1]['iou'], expected)]
    (text,) = worth(figures)
    assert text == (
        f'After stage 1, all classes together have {means[0]:.1f} mIoU, and would have {means[1]:.1f} with '
        f'the model of stage 0 as it was: all learning since was worth {means[0] - means[1]:+.1f}.'
    )


def test_a_class_that_no_image_shows_counts_only_for_a_model_that_predicts_it() -> None:
    stage = dict(stage=1, iou=dict(background=60.0, a=30.0, b=0.0), unchanged=dict(background=60.0, a=40.0, b=None))
    assert worth([stage])[0].endswith(
        'have 30.0 mIoU, and would have 50.0 with the model of stage 0 as it was: all learning since was worth -20.0.'
    )


def test_a_stage_that_changed_nothing_was_worth_nothing(skilled: Path, figures: list[dict], tmp_path: Path) -> None:
    run = copied(skilled, tmp_path / 'run')
    first = torch.load(run / 'stage_0/snapshot.pth', weights_only=False)['state_dict']

    def as_before(weights: dict[str, Tensor]) -> None:
        """All of stage 0, and a new row that never wins."""
        for key, value in first.items():
            weights[key] = torch.cat([value, weights[key][len(value) :]]) if key in (BIAS, WEIGHT) else value
        weights[BIAS][len(first[BIAS]) :] = -1e6

    change(run / 'stage_1', as_before)
    stages = list(diagnose(run, images=4, device='cpu'))
    assert stages[1]['iou'] == stages[1]['unchanged']
    assert worth(stages)[0].endswith('was worth +0.0.')


def test_a_bias_that_takes_all_is_named(skilled: Path, figures: list[dict], tmp_path: Path) -> None:
    run = copied(skilled, tmp_path / 'run')
    channel = figures[1]['classes'].index(NEW)
    change(run / 'stage_1', lambda weights: weights[BIAS][channel].add_(50))
    (shifted,) = diagnose(run, only=1, device='cpu')
    assert shifted['oracle'] == figures[1]['oracle']
    counts = np.array(shifted['confusion'])
    assert (counts.sum(0) > 0).nonzero()[0].tolist() == [channel]
    stages = [figures[0], shifted]
    assert any(
        text.startswith(f"After stage 1, 100 % of background's pixels are predicted as {NEW}, which stage 1 learned.")
        for text in texts(stages, 'confusion')
    )
    first = texts(stages, 'classifier')[0]
    assert re.match(rf"After stage 1, {NEW}'s bias is [45]\d\.\d\d above the mean of the old classes", first)
    own, oracle = figures[0]['iou']['background'], shifted['oracle']['iou']['background']
    assert any(
        text.startswith(f'The encoder still separates background after stage 1 (ridge {oracle:.1f}, ')
        and text.endswith(f'where the head has lost it (0.0, {own:.1f} after stage 0).')
        for text in texts(stages, 'oracle')
    )
    # Alone, the stage has no figures to compare with.
    expected = f'The encoder separates background after stage 1 (ridge {oracle:.1f}) where the head does not (0.0).'
    assert expected in texts([shifted], 'oracle')
    assert not [text for text in texts([shifted], 'confusion') if 'after stage 0' in text]


def test_a_class_that_its_own_stage_did_not_learn_is_among_the_largest_effects(
    skilled: Path, figures: list[dict], tmp_path: Path
) -> None:
    run = copied(skilled, tmp_path / 'run')
    channel = figures[1]['classes'].index(NEW)
    # No pixel is the new class any more, and most that were are background.
    change(run / 'stage_1', lambda weights: (weights[BIAS][channel].sub_(50), weights[BIAS][0].add_(2)))
    found = write_diagnosis(run, None, None, 'cpu', lambda images, *_: images)
    (text,) = (one['text'] for one in found['findings'] if (one['part'], one['class']) == ('learning', NEW))
    counts = np.array(found['stages'][1]['confusion'])[channel]
    share = 100 * counts[0] / counts.sum()
    assert text == (
        f"Stage 1 hardly learned {NEW}: {share:.0f} % of {NEW}'s pixels are predicted as background, although the "
        f"encoder separates it (ridge {figures[1]['oracle']['iou'][NEW]:.1f})."
    )
    assert text in found['largest']


def test_an_encoder_that_knows_nothing_is_named(skilled: Path, figures: list[dict], tmp_path: Path) -> None:
    run = copied(skilled, tmp_path / 'run')

    def forget(weights: dict[str, Tensor]) -> None:
        for key, value in weights.items():
            if key.startswith('backbone.') and value.is_floating_point():
                value.zero_()

    change(run / 'stage_1', forget)
    (empty,) = diagnose(run, only=1, device='cpu')
    assert empty['oracle']['iou'][KNOWN] == 0
    own, oracle = figures[0]['iou'][KNOWN], figures[0]['oracle']['iou'][KNOWN]
    expected = (
        f'The encoder itself has lost {KNOWN} after stage 1: the ridge oracle falls from {oracle:.1f} after stage 0 to '
        f'0.0, and the head from {own:.1f} to 0.0.'
    )
    assert expected in texts([figures[0], empty], 'oracle')


def test_attention_that_stayed_has_distance_0(skilled: Path, figures: list[dict], tmp_path: Path) -> None:
    run = copied(skilled, tmp_path / 'run')
    before = torch.load(run / 'stage_0/snapshot.pth', weights_only=False)['state_dict']
    kept = {key: value for key, value in before.items() if key.startswith('backbone.')}
    change(run / 'stage_1', lambda weights: weights.update(kept))
    (same,) = diagnose(run, only=1, images=3, device='cpu')
    moved = [value for values in same['attention'].values() for value in values if value is not None]
    assert moved
    assert not any(moved)
    assert texts([same], 'attention') == []
    assert len(texts(figures, 'attention')) == 3  # the old classes


def test_distances_are_those_of_the_attention_views(skilled: Path) -> None:
    old, new = (load_stage(skilled / f'stage_{number}', 'cpu') for number in (0, 1))
    dataset = eval_dataset(new.cfg)
    measured = KeptAttention(old, new)
    expected: dict[str, list[list[float]]] = {name: [[] for _ in range(4)] for name in new.classes[1:]}
    for sample in (dataset[0], dataset[1]):
        measured.add(sample)
        labels = sample['data_samples'].gt_sem_seg.data[0].long()
        for channel, name in enumerate(new.classes[1:], 1):
            for block, view in enumerate(view_classes(old, new, sample, channel, labels)[0]):
                if view is not None:
                    expected[name][block].append(view.distance)
    for name, values in measured.by_class().items():
        means = [float(np.mean(block)) if block else None for block in expected[name]]
        assert [value is None for value in values] == [value is None for value in means]
        assert [v for v in values if v] == pytest.approx([v for v in means if v], rel=1e-4)


def test_pseudo_labels_are_counted_as_a_loop_does() -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randint(0, 3, (2, 6, 7), generator=generator) % 2 * 4
    true = torch.where(given == 0, torch.randint(0, 4, given.shape, generator=generator), given)
    given[true == 3], true[true == 3] = 255, 255
    completed = torch.where(given == 0, torch.randint(0, 4, given.shape, generator=generator), given)
    completed[completed == 3] = 255
    found = quality(labelled_as(given, completed, true, 3), ['background', 'a', 'b'])
    pixels = [
        (int(t), int(c))
        for g, t, c in zip(given.flatten(), true.flatten(), completed.flatten(), strict=True)
        if g == 0
    ]
    assert found['ignored'] == pytest.approx(100 * sum(c == 255 for _, c in pixels) / len(pixels))
    for label, name in enumerate(('background', 'a', 'b')):
        called, there = ([pair for pair in pixels if pair[part] == label] for part in (1, 0))
        right = sum(t == c == label for t, c in pixels)
        assert found['classes'][name] == pytest.approx(
            dict(share=100 * len(called) / len(pixels), precision=100 * right / len(called),
                 recall=100 * right / len(there))
        )  # fmt: skip
    nothing = quality(torch.zeros(2, 3, dtype=torch.int64), ['background', 'a'])
    assert nothing['classes']['a'] == dict(share=None, precision=None, recall=None)


def test_training_images_have_all_seen_labels(tiny_runs: list[Path]) -> None:
    """And by the table, those that the stage was trained with."""
    cfg = Config.fromfile(tiny_runs[0] / 'stage_1/config.py')
    images = training_images(cfg)
    own = dict(stage_dataset_cfg(cfg.train_dataloader.dataset), pipeline=cfg.test_pipeline)
    trained = DATASETS.build(own)
    assert len(images.own) == len(trained)
    assert set(images.own) < set(images.seen)
    old = set()
    for number, place in enumerate(images.own):
        true = images.dataset[place]['data_samples'].gt_sem_seg.data
        given = trained[number]['data_samples'].gt_sem_seg.data
        assert torch.equal(images.stage_labels[true.long()], given.long())
        old |= set(true.unique().tolist()) & {1, 2, 3}
    assert old == {1, 2, 3}


def test_some_images_are_always_the_same_ones(tiny_runs: list[Path]) -> None:
    dataset = eval_dataset(Config.fromfile(tiny_runs[0] / 'stage_1/config.py'))
    few, more = (some(dataset, range(len(dataset)), number) for number in (3, 6))
    assert few == some(dataset, range(len(dataset)), 3)
    assert len(few) == 3
    assert set(few) < set(more)
    assert more == sorted(more)
    assert some(dataset, [4, 2], 2) == [4, 2]


def test_the_oracle_is_a_weighted_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    pixels[:, -1] = 1
    labels = torch.randint(0, 3, (40,), generator=generator).clamp(max=2)
    labels[:20], labels[20:23] = 0, 255
    moments = torch.zeros(3, 4, 4, dtype=torch.float64)
    add_moments(moments, pixels[:15], labels[:15])
    add_moments(moments, pixels[15:], labels[15:])
    used = [(x, int(y)) for x, y in zip(pixels, labels, strict=True) if y != 255]
    counts = {label: sum(y == label for _, y in used) for label in range(3)}
    raw = {label: count**-0.5 for label, count in counts.items()}
    mean = sum(raw[y] for _, y in used) / len(used)
    left, right = torch.eye(4, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    for x, y in used:
        left += raw[y] / mean * torch.outer(x, x)
        right[:, y] += raw[y] / mean * x
    torch.testing.assert_close(oracle_rows(moments), torch.linalg.solve(left, right).T)


def test_rows_are_those_of_the_predictions() -> None:
    head = nn.Module()
    with pytest.raises(NotMeasurableError, match='Module has no linear classifier conv_seg'):
        classifier_rows(head, ['background', 'a'])
    head.conv_seg = nn.Conv2d(2, 2, 1)
    head.conv_seg.weight.data = torch.tensor([[3.0, 4.0], [0.0, 2.0]])[..., None, None]
    head.conv_seg.bias.data = torch.tensor([1.0, -1.0])
    expected = dict(bias=dict(background=1.0, a=-1.0), norm=dict(background=5.0, a=2.0))
    assert classifier_rows(head, ['background', 'a']) == expected
    head.conv_seg = ClosedFormClassifier(2, 2, width=3)
    head.conv_seg.set_rows(torch.ones(2, 3))
    with pytest.raises(NotMeasurableError, match='closed form'):
        classifier_rows(head, ['background', 'a'])


def test_a_head_that_goes_on_behind_its_classifier_has_no_oracle(skilled: Path) -> None:
    stage = load_stage(skilled / 'stage_0', 'cpu')
    images = training_images(stage.cfg, 1)
    stage.model.decode_head.register_forward_hook(lambda *call: 2 * call[2])
    with pytest.raises(NotMeasurableError, match='are not those of its conv_seg'):
        fit_oracle(stage, images.dataset, images.seen)


def test_outputs_beside_the_classes_are_never_the_oracle_s() -> None:
    """Those of SSUL's unknown class, or of classes of later stages."""
    head = nn.Module()
    head.conv_seg = nn.Conv2d(2, 4, 1)
    features = torch.randn(1, 2, 3, 3)
    rows = torch.randn(3, 3, dtype=torch.float64)
    with oracle_in_place(head, rows):
        scores = head.conv_seg(features)
    expected = torch.einsum('kc,bchw->bkhw', rows[:, :-1].float(), features) + rows[:, -1].float()[:, None, None]
    torch.testing.assert_close(scores[:, :3], expected)
    assert (scores[:, 3].sigmoid() == 0).all()
    assert not torch.equal(head.conv_seg(features), scores)


def test_a_model_that_is_tested_in_windows(tiny_runs: list[Path], tmp_path: Path) -> None:
    run = copied(tiny_runs[0], tmp_path / 'run')
    for folder in run.iterdir():
        cfg = Config.fromfile(folder / 'config.py')
        cfg.model.test_cfg = dict(mode='slide', crop_size=(48, 48), stride=(16, 16))
        cfg.dump(folder / 'config.py')
    (stage,) = diagnose(run, only=1, images=2, device='cpu')
    assert list(stage['left_out']) == []
    assert np.sum(stage['confusion']) == 2 * 64 * 64
    assert sum(values['share'] for values in stage['pseudo_labels']['classes'].values()) == pytest.approx(
        100 - stage['pseudo_labels']['ignored']
    )


def test_without_training_data_the_rest_is_measured(tiny_runs: list[Path], tmp_path: Path) -> None:
    run = copied(tiny_runs[0], tmp_path / 'run')
    cfg = Config.fromfile(run / 'stage_1/config.py')
    cfg.train_dataloader.dataset.dataset = dict(
        type='BaseSegDataset', data_root=str(tmp_path), ann_file='gone.txt', pipeline=[],
        data_prefix=dict(img_path='', seg_map_path=''),
        metainfo=dict(classes=['background', *'abcdef'], palette=[[i, i, i] for i in range(7)]),
    )  # fmt: skip
    cfg.dump(run / 'stage_1/config.py')
    (stage,) = diagnose(run, only=1, images=1, device='cpu')
    assert stage['oracle'] is stage['pseudo_labels'] is None
    for part in ('oracle', 'pseudo_labels'):
        assert stage['left_out'][part].startswith('the training data are not there: ')
        assert 'gone.txt' in stage['left_out'][part]
    assert stage['attention']
    assert stage['classifier']
    assert texts([stage], 'oracle') == []


def test_a_stage_without_evaluation_images_is_skipped(
    skilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = copied(skilled, tmp_path / 'run')

    def images(cfg: Config) -> object:
        if 'stage_1' not in cfg.work_dir:
            raise NoImagesError('none of 0 images is left for eval')
        return eval_dataset(cfg)

    monkeypatch.setattr('mmseg_sats.engine.diagnosis.diagnose.eval_dataset', images)
    main(['diagnose', str(run), '--images', '1', '--device', 'cpu'])
    told = json.loads((run / 'diagnosis.json').read_text())
    assert told['skipped'] == dict(stage_0='none of 0 images is left for eval')
    assert [stage['stage'] for stage in told['stages']] == [1]
    assert told['stages'][0]['attention']
    with pytest.raises(SystemExit, match='none of 0 images is left for eval'):
        main(['diagnose', str(run), '--stage', '0', '--device', 'cpu'])


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ([], r"nothing is no run's folder, or no stage of it is finished: expected stage_0/snapshot.pth in it$"),
        (['--images', '0'], r'--images 0: expected 1 or more'),
        (['--device', 'cud'], r'--device cud: '),
    ],
)
def test_what_cannot_be_diagnosed_is_said(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(['diagnose', str(tmp_path / 'nothing'), *words])


def test_stages_without_snapshot_are_said(tiny_runs: list[Path]) -> None:
    with pytest.raises(SystemExit, match=r'stage_5/snapshot.pth does not exist: expected one of stages 0, 1$'):
        main(['diagnose', str(tiny_runs[0]), '--stage', '5'])
    with pytest.raises(SystemExit, match=r'for one stage: .*/sats --stage 1$'):
        main(['diagnose', str(tiny_runs[0] / 'stage_1')])

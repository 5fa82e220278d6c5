# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The four settings against plain Python: which images a stage has, and which labels they show."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmseg_sats.datasets.checks.whole_dataset import Examination
from mmseg_sats.datasets.class_index.deal import deal
from mmseg_sats.datasets.class_index.index import select_train
from mmseg_sats.datasets.incremental_dataset import IncrementalDataset
from mmseg_sats.protocol import SETTINGS, Protocol
from tests.shared import shared_path

PROTOCOL = Protocol('2-1', num_classes=5, class_order=[4, 2, 5, 1, 3])
CLASSES = range(1, 6)


def drawn(number: int = 40) -> tuple[list[str], list[set[int]]]:
    """Names of images and the labels that each shows, 255 and background among them."""
    generator = np.random.default_rng(3)
    shown = [set(np.flatnonzero(generator.random(6) < 0.35).tolist()) | {255} for _ in range(number)]
    return [f'image_{index * 7 % number:02d}.jpg' for index in range(number)], shown


def dealt_by_hand(names: list[str], shown: list[set[int]]) -> dict[str, int]:
    labels = dict(zip(names, shown, strict=True))
    counts = dict.fromkeys(CLASSES, 0)
    result = {}
    for name in sorted(names, key=lambda n: (len(labels[n] & set(CLASSES)), hashlib.sha256(n.encode()).digest())):
        result[name] = 0
        for class_id in sorted(labels[name] & set(CLASSES), key=lambda c: (counts[c], c))[:1]:
            counts[class_id] += 1
            result[name] = class_id
    return result


def wanted(setting: str, names: list[str], shown: list[set[int]], stage: int) -> list[int]:
    """The images of a stage."""
    new, future = (set(getattr(PROTOCOL.stages[stage], part)) for part in ('new', 'future'))
    dealt = dealt_by_hand(names, shown)
    rules = dict(
        overlapped=lambda row: shown[row] & new,
        disjoint=lambda row: shown[row] & new and not shown[row] & future,
        sequential=lambda row: shown[row] & new and not shown[row] & future,
        partitioned=lambda row: dealt[names[row]] in new,
    )
    return [row for row in range(len(names)) if rules[setting](row)]


def presence_of(shown: list[set[int]]) -> np.ndarray:
    presence = np.zeros((len(shown), 256), bool)
    for row, labels in enumerate(shown):
        presence[row, list(labels)] = True
    return presence


@pytest.mark.parametrize('setting', SETTINGS)
def test_every_setting_by_hand(setting: str) -> None:
    names, shown = drawn()
    presence, paths = presence_of(shown), [f'/data/images/{name}' for name in names]
    dealt = deal(presence, paths, CLASSES)
    found = Examination(paths, presence.astype(np.int64) * 9, [])
    for stage in PROTOCOL.stages:
        rows = wanted(setting, names, shown, stage.index)
        assert 0 < len(rows) < len(names)
        assert select_train(presence, stage, setting, dealt).tolist() == rows
        assert found.rows(stage, 'train', setting).tolist() == rows  # what `mmseg-sats check` counts


@pytest.mark.parametrize('setting', SETTINGS)
def test_every_setting_through_a_data_set(setting: str, tmp_path: Path) -> None:
    names, shown = drawn(20)
    for folder in ('img', 'ann'):
        (tmp_path / folder).mkdir()
    for name, labels in zip(names, shown, strict=True):
        mask = np.zeros((1, 8), np.uint8)
        mask[0, : len(labels)] = sorted(labels)
        Image.fromarray(mask).save(tmp_path / 'ann' / Path(name).with_suffix('.png'))
        Image.fromarray(np.zeros((1, 8, 3), np.uint8)).save(tmp_path / 'img' / name)
    (tmp_path / 'list.txt').write_text('\n'.join(Path(name).stem for name in names))
    wrapped = dict(
        type='BaseSegDataset', data_root=str(tmp_path), ann_file='list.txt', serialize_data=False,
        data_prefix=dict(img_path='img', seg_map_path='ann'), pipeline=[dict(type='LoadAnnotations')],
        metainfo=dict(classes=('background', *'abcde'), palette=[[0, 0, 0]] * 6),
    )  # fmt: skip
    for stage in PROTOCOL.stages:
        dataset = IncrementalDataset(
            wrapped, '2-1', stage.index, class_order=PROTOCOL.class_order, setting=setting,
            cache_dir=str(tmp_path / 'cache'),
        )  # fmt: skip
        assert dataset.indices.tolist() == wanted(setting, names, shown, stage.index)
        visible = stage.seen if setting == 'sequential' else stage.new
        for place, row in enumerate(dataset.indices):
            channels = {stage.seen.index(label) + 1 for label in shown[row] if label in visible}
            assert set(np.unique(dataset[place]['gt_seg_map'])) - {0, 255} == channels


def test_a_deal_depends_on_names_and_labels_alone() -> None:
    names, shown = drawn()
    dealt = dict(zip(names, deal(presence_of(shown), [f'/a/b/{n}' for n in names], CLASSES), strict=True))
    order = np.random.default_rng(0).permutation(len(names))
    moved = deal(presence_of([shown[row] for row in order]), [f'c/{names[row]}' for row in order], [5, 3, 1, 2, 4])
    assert {names[row]: moved[place] for place, row in enumerate(order)} == dealt
    assert len(deal(np.zeros((0, 6), bool), [], CLASSES)) == 0


@pytest.fixture(scope='module')
def voc() -> tuple[np.ndarray, np.ndarray]:
    """Which labels VOC's training images show, and the class that each is dealt to."""
    facts = np.load(shared_path('facts/voc12aug_class_presence.npz'), allow_pickle=False)
    return facts['train'], deal(facts['train'], facts['train_ids'].tolist(), range(1, 21))


@pytest.mark.parametrize('name', ['19-1', '15-5', '15-1', '10-1', '5-3', '2-2'])
def test_the_stages_of_voc_share_its_images_out(name: str, voc: tuple[np.ndarray, np.ndarray]) -> None:
    presence, dealt = voc
    stages = [select_train(presence, stage, 'partitioned', dealt) for stage in Protocol(name, num_classes=20).stages]
    with_class = np.flatnonzero(presence[:, 1:].any(axis=1))
    assert sum(len(one) for one in stages) == len(with_class)
    assert np.array_equal(np.sort(np.concatenate(stages)), with_class)


def test_a_protocol_of_finer_stages_divides_the_same_images(voc: tuple[np.ndarray, np.ndarray]) -> None:
    presence, dealt = voc
    coarse, fine = (
        [select_train(presence, stage, 'partitioned', dealt).tolist() for stage in Protocol(name).stages]
        for name in ('15-5', '15-1')
    )
    assert coarse[0] == fine[0]
    assert coarse[1] == sorted(row for rows in fine[1:] for row in rows)


def test_a_deal_of_voc_is_even(voc: tuple[np.ndarray, np.ndarray]) -> None:
    presence, dealt = voc
    assert presence[np.arange(len(presence)), dealt].all()
    assert (dealt == 0).sum() == (~presence[:, 1:].any(axis=1)).sum()
    # A class of few images keeps nearly all of them; a third of all images show a person.
    held = presence.sum(axis=0)[1:]
    sizes = np.bincount(dealt, minlength=21)[1:]
    assert (sizes >= np.minimum(held, 430) * 0.85).all()
    assert sizes.max() < 0.3 * held.max()


def test_images_that_were_not_dealt() -> None:
    with pytest.raises(ValueError, match=r"setting='partitioned' needs dealt"):
        select_train(np.zeros((2, 6), bool), PROTOCOL.stages[0], 'partitioned')

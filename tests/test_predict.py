# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Overlays: what is drawn, and the tool over many images of which some are broken."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmseg_sats.visualization.overlay import draw_legend, draw_overlay
from tests.in_process import call
from tests.stage_folder import CLASSES, PALETTE, make_stage

IMAGE = np.full((40, 300, 3), 100, np.uint8)


def test_colours_lie_over_the_classes_and_background_is_left_alone() -> None:
    labels = np.zeros((40, 300), np.int64)
    labels[10:30, 100:200] = 2
    picture = draw_overlay(IMAGE, labels, CLASSES, PALETTE)
    assert picture[5, 5].tolist() == [100, 100, 100]
    expected = [(100 + colour) / 2 for colour in PALETTE[2]]
    np.testing.assert_allclose(picture[20, 150], expected, atol=1)
    assert picture[20, 100].tolist() == list(PALETTE[2])  # the outline is opaque


def test_the_legend_names_what_is_found_and_nothing_else() -> None:
    labels = np.zeros((40, 300), np.int64)
    labels[:, :30] = 3
    legend = draw_legend(labels, CLASSES, PALETTE, 300)
    present = {tuple(pixel) for pixel in legend.reshape(-1, 3)}
    for channel in range(5):
        assert (tuple(PALETTE[channel]) in present) == (channel == 3), CLASSES[channel]
    # One row: both names fit beside each other; in a narrow one they stand below each other.
    assert len(legend) == 22
    assert len(draw_legend(labels, CLASSES, PALETTE, 140)) == 44


def test_a_legend_wider_than_the_image_is_not_cut() -> None:
    labels = np.zeros((8, 8), np.int64)
    name = 'a class with quite a long name, as people give them to their classes'
    picture = draw_overlay(IMAGE[:8, :8], labels, [name], PALETTE[:1])
    ink = np.flatnonzero((picture[8:] < 100).any(axis=(0, 2)))
    assert 240 < ink.max() < picture.shape[1] - 4


def test_labels_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r'\(40, 300\) pixels, its labels \(40, 299\)'):
        draw_overlay(IMAGE, np.zeros((40, 299), np.int64), CLASSES, PALETTE)


def test_an_unreadable_image_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    stage = make_stage(tmp_path / 'run')
    rng = np.random.default_rng(0)
    for name in ('in/a.jpg', 'in/sub/a.png', 'b.JPG'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix.lower(), rng.integers(0, 255, (50, 70, 3)))[1])
    (tmp_path / 'in/broken.jpg').write_bytes((tmp_path / 'in/a.jpg').read_bytes()[:30])
    (tmp_path / 'in/notes.txt').write_text('not looked at')
    done = call(
        'tools/predict.py', str(stage), str(tmp_path / 'in'),
        str(tmp_path / 'b.JPG'), str(tmp_path / 'none.jpg'), '--out', str(tmp_path / 'out'),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-2000:]
    assert f'{tmp_path}/in/broken.jpg is no image' in done.stderr
    assert f'{tmp_path}/none.jpg cannot be read' in done.stderr
    assert f'3 of 5 images: overlays in {tmp_path}/out' in done.stdout
    written = {path.name for path in (tmp_path / 'out').iterdir()}
    assert written == {'a.png', 'a_2.png', 'b.png'}
    assert cv2.imread(str(tmp_path / 'out/b.png')).shape[1] == 240

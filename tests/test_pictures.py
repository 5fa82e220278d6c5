# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What the pictures of reports and of the tools are made of."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmseg_sats.datasets.folder import IGNORED_COLOUR
from mmseg_sats.visualization import theme
from mmseg_sats.visualization.masks import overlay
from mmseg_sats.visualization.panel import sample_image
from mmseg_sats.visualization.stage_model import load_stage

PALETTE = [[0, 0, 0], [200, 100, 0]]


def test_an_overlay_mixes_photograph_and_colour_but_for_background_and_outline() -> None:
    image = np.full((20, 30, 3), 100, np.uint8)
    labels = np.zeros((20, 30), np.int64)
    labels[:, 10:20], labels[:, 20:] = 1, 255
    picture = overlay(image, labels, PALETTE, strength=0.75)
    assert picture[5, 3].tolist() == [100, 100, 100]
    assert picture[5, 15].tolist() == [0.25 * 100 + 0.75 * colour for colour in PALETTE[1]]
    assert picture[5, 25].tolist() == [0.25 * 100 + 0.75 * colour for colour in IGNORED_COLOUR]
    assert PALETTE[1] in picture[5].tolist()


@pytest.mark.parametrize(
    ('suffix', 'background', 'dpi'), [('svg', 'none', 100), ('png', 'white', 200), ('pdf', 'white', 100)]
)
def test_a_figure_is_rendered_as_savefig_would(
    suffix: str, background: str, dpi: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('SOURCE_DATE_EPOCH', '0')  # the date in the files
    with theme.style():
        figure, (left, right) = theme.new_figure(2, columns=2)
        left.plot([1, 3, 2], label='mIoU')
        left.legend()
        right.imshow(np.eye(5))
        theme.lay_out(figure)
        found = theme.render(figure, suffix, background, dpi)
        expected = io.BytesIO()
        figure.savefig(expected, format=suffix, facecolor=background, dpi=dpi)
    assert found == expected.getvalue()


@pytest.mark.parametrize('size', [(8, 12), (4, 6)])
def test_the_image_of_a_sample_has_the_size_of_its_labels(size: tuple[int, int]) -> None:
    labels = SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, *size)))
    inputs = torch.arange(3.0)[:, None, None].expand(3, 8, 12)
    image = sample_image(dict(inputs=inputs, data_samples=labels))
    assert image.shape == (*size, 3)
    assert (image == [2, 1, 0]).all()  # BGR to RGB


def test_a_stage_is_shown_without_the_snapshot_of_the_stage_before(tiny_runs: list[Path], tmp_path: Path) -> None:
    for name in ('config.py', 'snapshot.pth'):
        shutil.copy(tiny_runs[0] / 'stage_1' / name, tmp_path)
    config, before = tmp_path / 'config.py', str(tiny_runs[0] / 'stage_0/snapshot.pth')
    text = config.read_text()
    assert before in text
    config.write_text(text.replace(before, '/gone/snapshot.pth'))
    assert load_stage(tmp_path).model.old_model is None

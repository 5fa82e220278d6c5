# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The attention viewer: its numbers are AttentionMap.pool's and the loss's."""

import runpy
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmseg_sats.functional import crp_loss
from mmseg_sats.functional.attention.attention_map import AttentionMap
from mmseg_sats.visualization import attention_view, theme
from mmseg_sats.visualization.stage_model import (
    StageModel,
    load_sample,
    load_stage,
    mask_channels,
    previous_stage,
)

TOOL = Path(__file__).parents[1] / 'tools/visualize_attention.py'


@pytest.fixture(scope='module')
def stages(tiny_runs: list[Path]) -> tuple[StageModel, StageModel]:
    return load_stage(tiny_runs[0] / 'stage_0'), load_stage(tiny_runs[0] / 'stage_1')


@pytest.fixture(scope='module')
def photograph(shapes_root: Path) -> Path:
    return next(path for path in sorted(shapes_root.rglob('val/images/*.png')) if 'size64' in str(path))


@pytest.fixture(scope='module')
def mask(photograph: Path) -> Path:
    return photograph.parents[1] / 'masks' / photograph.name


@pytest.fixture(scope='module')
def tool() -> Callable[[list[str]], None]:
    return runpy.run_path(str(TOOL))['main']


def test_the_numbers_are_those_of_pool_and_of_the_loss(
    stages: tuple[StageModel, StageModel], photograph: Path, mask: Path
) -> None:
    old, new = stages
    sample = load_sample(new, photograph)
    labels = mask_channels(new, mask)
    channel = int(torch.bincount(labels.flatten())[1:].argmax()) + 1
    views, used = attention_view.view_classes(old, new, sample, channel, labels)
    assert used is labels
    maps = [attention_view.attentions(one, one.preprocess(sample)['inputs']) for one in stages]
    alone = torch.where(labels == channel, channel, 0)
    seen = 0
    for view, before, after in zip(views, *maps, strict=True):
        grid = F.interpolate(labels[None, None].float(), before.query_hw, mode='nearest')[0].long()
        if view is None:
            assert not (grid == channel).any()
            continue
        for mine, one in ((view.old, before), (view.new, after)):
            means, _, classes = one.pool(grid.to(one.query.device))
            expected = means[classes == channel][0].cpu()
            # Up to rounding: other regions of the picture change the order of a sum.
            torch.testing.assert_close(mine.flatten(1), expected)
            dense = one.dense()[0].cpu()[:, (grid == channel).flatten()].mean(1)
            torch.testing.assert_close(mine.flatten(1), dense)
        term = crp_loss([after], [before], alone[None].to(after.query.device))
        assert view.distance == pytest.approx(float(term), rel=1e-5)
        size = view.change.square().sum().sqrt()
        heads = (view.new - view.old).square().sum() / len(view.new)
        torch.testing.assert_close(size, heads.sqrt())
        seen += 1
    assert seen >= 2


def test_a_point_sees_its_own_row(stages: tuple[StageModel, StageModel], photograph: Path) -> None:
    sample = load_sample(stages[1], photograph)
    maps = [attention_view.attentions(one, one.preprocess(sample)['inputs']) for one in stages]
    views = attention_view.point_views(*maps, (0.99, 0.3))
    for view, before in zip(views, maps[0], strict=True):
        height, width = before.query_hw
        row = before.dense()[0, :, int(0.3 * height) * width + width - 1].cpu()
        torch.testing.assert_close(view.old.flatten(1), row)
        torch.testing.assert_close(view.old.sum((1, 2)), torch.ones(before.num_heads))
    with theme.style():
        figure = attention_view.draw_attention(np.zeros((64, 64, 3), np.uint8), views, 'it', (63, 19))
    assert len(figure.axes) == 3 * len(views)


def test_the_tool_writes_a_picture(
    tool: Callable[[list[str]], None],
    tiny_runs: list[Path],
    photograph: Path,
    mask: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    stage = str(tiny_runs[0] / 'stage_1')
    tool([stage, str(photograph), '--mask', str(mask), '--out', str(tmp_path / 'a.png')])
    said = capsys.readouterr().out
    assert said.count('distance') == 4
    assert f'its region is that of {mask}' in said
    assert cv2.imread(str(tmp_path / 'a.png')).std() > 10
    tool([stage, str(photograph), '--point', '10', '20', '--out', str(tmp_path / 'b.png')])
    assert (tmp_path / 'b.png').is_file()


def test_what_the_tool_cannot_do_it_says(
    tool: Callable[[list[str]], None], tiny_runs: list[Path], photograph: Path, mask: Path
) -> None:
    stage = str(tiny_runs[0] / 'stage_1')
    name = load_stage(stage).classes[1]
    for words, message in (
        ([stage, str(photograph), '--class', name[:-1]], f"did you mean '{name}'"),
        ([stage, str(photograph), '--point', '64', '1'], 'outside the image of 64 x 64'),
        ([stage, 'none.png'], 'image none.png does not exist'),
        ([stage, __file__], 'cannot be read as an image'),
        ([str(tiny_runs[0] / 'stage_0'), str(photograph)], 'stage 0 has no old model'),
        ([str(tiny_runs[0]), str(photograph)], 'config.py|snapshot.pth does not exist'),
    ):
        with pytest.raises(SystemExit, match=message):
            tool(words)
    assert previous_stage(stage) == (tiny_runs[0] / 'stage_0').resolve()


def test_a_backbone_without_attention_is_named(stages: tuple[StageModel, StageModel]) -> None:
    stage = StageModel(stages[1].folder, stages[1].cfg, torch.nn.Module(), [], [])
    stage.model.backbone = torch.nn.Identity()
    with pytest.raises(ValueError, match=r'the backbone Identity of .* gives no self-attention'):
        attention_view.attentions(stage, torch.zeros(1, 3, 8, 8))


def test_a_key_without_a_place_is_left_out_of_the_picture() -> None:
    """ViT's class token stands in front of the keys of the grid."""
    query, key = torch.randn(2, 1, 2, 6, 4), torch.randn(2, 1, 2, 7, 4)
    maps = [AttentionMap(q, k, 0.5, (2, 3), (2, 3), extra_keys=1) for q, k in zip(query, key, strict=True)]
    labels = torch.zeros(2, 3, dtype=torch.long)
    labels[0] = 1
    (region,) = attention_view.class_views(maps[:1], maps[1:], labels, 1)
    expected = maps[0].dense()[0, :, :3].mean(1)[:, 1:].reshape(2, 2, 3)
    torch.testing.assert_close(region.old, expected)
    (point,) = attention_view.point_views(maps[:1], maps[1:], (0.5, 0.9))
    torch.testing.assert_close(point.old, maps[0].dense()[0, :, 4, 1:].reshape(2, 2, 3))

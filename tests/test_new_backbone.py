# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The page on one more backbone: its code runs as it stands there."""

import doctest
import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS, init_default_scope
from mmseg.registry import MODELS
from torch import nn
from yapf.yapflib import yapf_api

from tests.conftest import CONFIGS
from tests.test_attention_mit import images

PAGE = (Path(__file__).parents[1] / 'docs' / 'new_backbone.md').read_text()
CODE, CONFIG = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
(SESSION,) = re.findall(r'```pycon\n(.*?)```', PAGE, re.DOTALL)


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's two files, where a person would put them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'plain_pyramid.py').write_text(CODE)
    path = tmp_path / 'plain_pyramid_shapes_3-3.py'
    path.write_text(CONFIG)
    return path


def test_the_code_is_short() -> None:
    assert len([line for line in CODE.splitlines() if line]) < 30


def test_the_page_names_the_recipes_that_there_are() -> None:
    for name in re.findall(r'`(\w+_(?:voc|ade20k))`', PAGE):
        assert (CONFIGS / '_base_' / f'{name}.py').is_file(), name


@pytest.mark.usefixtures('config_file')
def test_the_check_says_what_the_page_says() -> None:
    example = doctest.DocTestParser().get_doctest(SESSION, {}, 'page', None, 0)
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0


def test_it_learns_two_stages_by_attention(
    config_file: Path, shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yapf_api, 'FormatCode', lambda text, **_: (text, True))
    cfg = Config.fromfile(config_file)
    cfg.merge_from_dict(
        dict(data_root=str(shapes_root), work_dir=str(tmp_path / 'run'), epochs=1, image_size=64,
             crop_size=64, train_images=24, val_images=12, batch_size=8, report=None)
    )
    results = RUNNERS.build(cfg).train()
    assert [len(stage['new_classes']) for stage in results['stages']] == [3, 3]
    (path,) = (tmp_path / 'run' / 'stage_1').glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record for record in records if 'loss' in record][-1]['loss_attention'] > 0
    check_backbone(MODELS.build(cfg.model.backbone))


def check_backbone(backbone: nn.Module) -> None:
    """What it computes is what PyTorch's layers compute, output and weights."""
    init_default_scope('mmseg')
    backbone.eval()
    x = images(64, 96)
    features, attentions = backbone.forward_with_attention(x)
    for patch, layer, feature, attention in zip(
        backbone.patches, backbone.layers, features, attentions, strict=True
    ):
        tokens = patch(x).flatten(2).permute(2, 0, 1)
        _, weights = layer.self_attn(tokens, tokens, tokens, average_attn_weights=False)
        torch.testing.assert_close(attention.dense(), weights, atol=1e-5, rtol=1e-4)
        expected = layer(tokens).permute(1, 2, 0)
        torch.testing.assert_close(feature.flatten(2), expected, atol=1e-5, rtol=1e-4)
        x = feature

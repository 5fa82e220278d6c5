# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a slip on the command line is answered with."""

import argparse
from pathlib import Path

import pytest

from mmseg_sats.datasets.wrapped_dataset import build_wrapped
from mmseg_sats.engine.command_line import read_config
from mmseg_sats.utils.arguments import add_cfg_options

CONFIGS = Path(__file__).parents[1] / 'configs'
SHAPES = CONFIGS / 'sats/segformer_tiny_shapes_3-1.py'


def test_options_override_values() -> None:
    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    given = parser.parse_args(['--cfg-options', 'epochs=3', 'later_stages.lr=1e-4']).cfg_options
    cfg = read_config(SHAPES, given)
    assert (cfg.epochs, cfg.later_stages.lr) == (3, 1e-4)
    assert read_config(SHAPES, parser.parse_args([]).cfg_options).epochs != 3


def test_a_word_without_a_value_is_named(capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(['--cfg-options', 'epochs', '1'])
    assert '--cfg-options epochs: expected KEY=VALUE' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('path', 'options', 'error', 'message'),
    [
        ('none.py', {}, FileNotFoundError, r'config none\.py does not exist'),
        (CONFIGS, {}, FileNotFoundError, r'configs is a folder, expected a file$'),
        (CONFIGS / 'sats/sats.py', {}, ValueError, r'sats\.py says nothing of a model.*such as'),
        (CONFIGS.parent / 'README.md', {}, ValueError, r'README\.md is no config.*ends in \.py'),
        (SHAPES, {'protcol': '3-3'}, KeyError, r"no 'protcol' \(did you mean 'protocol'"),
        (SHAPES, {'train_pipeline': ''}, ValueError, r"train_pipeline= has no value.*'train_pipeline=\$name'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_config_is_named(
    path: str | Path, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_config(path, options)


def test_the_config_in_a_folder_is_proposed(tmp_path: Path) -> None:
    (tmp_path / 'config.py').write_text('')
    with pytest.raises(FileNotFoundError, match=r'is a folder.*did you mean .*config\.py\?'):
        read_config(tmp_path)


@pytest.mark.parametrize('there', [False, True])
def test_voc_that_is_not_there_is_named(tmp_path: Path, there: bool) -> None:
    """mmseg's own assertion has no text."""
    if there:
        (tmp_path / 'JPEGImages').mkdir()
    cfg = dict(
        type='PascalVOCDataset',
        data_root=str(tmp_path),
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
        ann_file='ImageSets/Segmentation/train.txt',
    )
    missing = 'SegmentationClass' if there else 'JPEGImages'
    with pytest.raises(FileNotFoundError, match=rf'{missing} does not exist.*data_root=DIR'):
        build_wrapped(cfg, [])

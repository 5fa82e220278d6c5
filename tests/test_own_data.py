# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""docs/own_data.md, its config and its commands as they stand, on data made foreign."""

import json
import shlex
from pathlib import Path

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS, init_default_scope
from mmseg.registry import MODELS

from mmseg_sats.checkpoint import load_checkpoint_safely
from mmseg_sats.datasets.shapes_drawing import draw_scene
from mmseg_sats.engine.trained_model import take_trained_model
from tests.foreign import PAGE, code_blocks, commands, lay_out, write_split
from tests.small_models import RESNET, RESNET_CHANNELS, auxiliary_head_cfg
from tests.stage_folder import make_stage
from tests.test_tools import run

NEW = {6: 11, 7: 12, 8: 40}  # the page's numbers of crate, pallet and forklift
OLD = ['road', 'grass', 'building', 'car', 'person']
SMALL = ['epochs=1', 'crop_size=64', 'batch_size=4', 'num_workers=0']


@pytest.fixture(scope='module')
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Drawn scenes of eight classes, as pairs of image and mask."""
    folder, pairs = tmp_path_factory.mktemp('scenes'), []
    for index in range(24):
        scene = draw_scene(
            index, split='train', num_classes=8, image_size=64, seed=0, classes_per_image=(2, 3)
        )
        pair = (folder / f'{index}.jpg', folder / f'{index}.png')
        for path, array in zip(pair, scene, strict=True):
            cv2.imwrite(str(path), array)
        pairs.append(pair)
    return pairs


def old_model(folder: Path, channels: int) -> None:
    """A model from elsewhere: a ResNet with an auxiliary head, and its mmseg config."""
    head = auxiliary_head_cfg(channels, index=3) | dict(in_channels=RESNET_CHANNELS[3])
    auxiliary = auxiliary_head_cfg(channels, index=2) | dict(in_channels=RESNET_CHANNELS[2])
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor', mean=[0.0] * 3, std=[255.0] * 3, bgr_to_rgb=True, size=(48, 48)
        ),
        pretrained='open-mmlab://never_fetched',
        backbone=dict(RESNET),
        decode_head=head,
        auxiliary_head=auxiliary,
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )
    Config(dict(model=model)).dump(folder / 'config.py')
    init_default_scope('mmseg')
    torch.manual_seed(0)
    built = MODELS.build(dict(model, pretrained=None))
    torch.save(dict(meta={}, state_dict=built.state_dict()), folder / 'model.pth')


@pytest.fixture
def yard(drawn: list[tuple[Path, Path]], tmp_path: Path) -> Path:
    """Where the page is followed: old/, data/yard/ and yard.py; no old class is drawn in a mask."""
    folder = lay_out(tmp_path / 'yard')
    old_model(folder / 'old', channels=5)
    for split, pairs in (('train', drawn[:16]), ('val', drawn[16:])):
        assert write_split(pairs, NEW, folder / 'data/yard', split, set(NEW)) > 2
    return folder


def follow(folder: Path, command: str, *more: str) -> None:
    done = run(*shlex.split(command), *more, cwd=folder)
    assert done.returncode == 0, f'{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}'


def test_the_config_is_short() -> None:
    assert len(code_blocks(PAGE, 'python')[0].splitlines()) < 30


def test_the_page_word_by_word(yard: Path) -> None:
    done = commands(PAGE)
    assert [command.split()[1] for command in done] == [
        'tools/check_dataset.py',
        'tools/train_incremental.py',
        'tools/predict.py',
        'tools/export.py',
    ]
    for command in done:
        more = ['--cfg-options', *SMALL] if 'train_incremental' in command else []
        follow(yard, command, *more)
    # Not on the page: evaluating again passes over stage 0 as the run did.
    follow(yard, 'python tools/test_incremental.py work_dirs/yard')
    results = json.loads((yard / 'work_dirs/yard/results.json').read_text())
    assert results['method'] == 'yard'
    first, second = results['stages']
    assert first['images'] is None
    assert first['new_classes'] == OLD
    assert set(first['iou'].values()) == {None}
    assert second['new_classes'] == ['crate', 'pallet', 'forklift']
    assert second['images'] == len(list((yard / 'data/yard/rgb/train').iterdir()))
    assert second['iou']['crate'] is not None
    logs = '\n'.join(path.read_text() for path in (yard / 'work_dirs/yard/stage_0').glob('*/*.log'))
    assert 'stage 0 is not evaluated' in logs
    weights = load_checkpoint_safely(yard / 'work_dirs/yard/stage_1/snapshot.pth')['state_dict']
    assert weights['decode_head.conv_seg.weight'].shape[0] == 9
    assert weights['auxiliary_head.conv_seg.weight'].shape[0] == 9
    assert len(list((yard / 'overlays').iterdir())) == len(list((yard / 'data/yard/rgb/val').iterdir()))
    assert (yard / 'yard_model/config.py').is_file()


def config(yard: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> Config:
    monkeypatch.chdir(yard)
    cfg = Config.fromfile(yard / 'yard.py')
    small = dict(epochs=1, crop_size=64, batch_size=4, num_workers=0, report=None)
    cfg.merge_from_dict(small | dict(work_dir='run', base='old/model.pth') | options)
    return cfg


def test_stage_0_is_the_old_model(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RUNNERS.build(config(yard, monkeypatch)).train()
    old = load_checkpoint_safely('old/model.pth')['state_dict']
    taken = load_checkpoint_safely('run/stage_0/snapshot.pth')['state_dict']
    for key, value in taken.items():
        own = value[1:] if 'conv_seg' in key else value  # behind the new background channel
        assert torch.equal(own, old[key]), key
    model = Config.fromfile('run/stage_1/config.py').model
    assert model.get('pretrained') is None
    assert model.data_preprocessor.std == [255.0] * 3
    assert model.backbone.base_channels == RESNET['base_channels']


def test_a_few_old_images_with_masks_are_seen_and_evaluated(
    drawn: list[tuple[Path, Path]], yard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {1: 101, 2: 102, 3: 103, 4: 104, 5: 105}
    values = NEW | old
    write_split(drawn[:10], values, yard / 'data/yard', 'train', set(NEW))
    write_split(drawn[10:16], old, yard / 'data/yard', 'train', set(old))  # for the memory
    write_split(drawn[16:], values, yard / 'data/yard', 'val', set(values))
    names = dict(zip(OLD, range(101, 106), strict=True))
    exec(code_blocks(PAGE, 'python')[1], {}, few := {})
    cfg = config(yard, monkeypatch, **few)
    cfg.mask_values.update(names)
    results = RUNNERS.build(cfg).train()
    assert results['stages'][0]['mIoU']['base'] is not None
    assert results['final']['hIoU'] is not None
    kept = json.loads((yard / 'run/stage_0/exemplars.json').read_text())
    assert 5 <= len(kept['exemplars']) <= kept['size'] == 20


def test_a_number_without_a_name_is_named(
    drawn: list[tuple[Path, Path]], yard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split(drawn[:16], NEW | {1: 77}, yard / 'data/yard', 'train', set(NEW))
    with pytest.raises(ValueError, match=r'labels/train/.*holds the numbers \[77\], which mask_values'):
        RUNNERS.build(config(yard, monkeypatch)).train()


def test_training_stage_0_needs_its_images(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r'stage 0: none of .* is left for train'):
        RUNNERS.build(config(yard, monkeypatch, base=None)).train()


def test_a_missing_model_config_is_named(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r'model_config old/none\.py does not exist'):
        RUNNERS.build(config(yard, monkeypatch, model_config='old/none.py'))


def test_a_model_of_another_kind_is_named(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (yard / 'old/cascade.py').write_text("model = dict(type='CascadeEncoderDecoder')")
    with pytest.raises(ValueError, match=r"cascade\.py: expected .* found 'CascadeEncoderDecoder'"):
        RUNNERS.build(config(yard, monkeypatch, model_config='old/cascade.py'))


def test_preprocessing_and_imports_come_along(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Config.fromfile(yard / 'old/config.py')
    preprocessor = trained.model.pop('data_preprocessor')
    trained.dump(yard / 'old/config.py')
    with pytest.raises(ValueError, match='has no data_preprocessor'):
        RUNNERS.build(config(yard, monkeypatch))
    trained.merge_from_dict(
        dict(data_preprocessor=preprocessor, custom_imports=dict(imports=['json', 'mmseg_sats']))
    )
    trained.dump(yard / 'old/config.py')
    cfg = config(yard, monkeypatch)
    take_trained_model(cfg)
    assert cfg.model.data_preprocessor.std == [255.0] * 3
    assert cfg.custom_imports.imports == ['mmseg_sats', 'json']


def test_a_stage_s_own_config_may_be_the_old_model_s(tmp_path: Path) -> None:
    stage = make_stage(tmp_path)
    assert 'old_model' in Config.fromfile(stage / 'config.py').model
    cfg = Config(dict(model_config=str(stage / 'config.py'), model=dict(classifier_init='random')))
    take_trained_model(cfg)
    assert not {'old_model', 'distillation', 'pseudo_labeler'} & set(cfg.model)
    assert cfg.model.classifier_init == 'random'
    assert cfg.model.backbone.type == 'AttentionMixVisionTransformer'


def test_names_in_another_order_are_refused(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint_safely(yard / 'old/model.pth')
    checkpoint['meta'] = dict(dataset_meta=dict(classes=OLD[::-1]))
    torch.save(checkpoint, yard / 'old/model.pth')
    with pytest.raises(ValueError, match=r"was trained on classes \['person'"):
        RUNNERS.build(config(yard, monkeypatch)).train()

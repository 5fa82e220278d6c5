# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""docs/own_data.md, its config and its commands as they stand, on data made foreign."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS, init_default_scope
from mmseg.registry import MODELS

from mmseg_sats.datasets.shapes.drawing import draw_scene
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.config.trained_model import note_on_sizes, take_trained_model
from mmseg_sats.protocol import Protocol
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from tests.foreign import PAGE, code_blocks, commands, lay_out, read_mask, write_split
from tests.in_process import ROOT, call
from tests.small_models import RESNET, RESNET_CHANNELS, auxiliary_head_cfg
from tests.stage_folder import make_stage

COMMAND = str(ROOT / 'mmseg_sats/__main__.py')
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


def follow(folder: Path, command: str, *more: str) -> str:
    name, *words = shlex.split(command)
    assert name == 'mmseg-sats'
    done = call(COMMAND, *words, *more, cwd=folder)
    assert done.returncode == 0, f'{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}'
    return done.stdout


def test_the_config_is_short() -> None:
    assert len(code_blocks(PAGE, 'python')[0].splitlines()) < 30


def test_the_page_word_by_word(yard: Path) -> None:
    done = commands(PAGE)[:4]
    assert [command.split()[1] for command in done] == [
        'check',
        'train',
        'predict',
        'export',
    ]
    for command in done:
        more = ['--cfg-options', *SMALL] if command.split()[1] == 'train' else []
        follow(yard, command, *more)
    # Not on the page: evaluating again passes over stage 0 as the run did.
    follow(yard, 'mmseg-sats test work_dirs/yard')
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
    with pytest.raises(ValueError, match=r'stage 0: none of .* is left for train.* \(--base\)'):
        RUNNERS.build(config(yard, monkeypatch, base=None)).train()


def test_a_missing_model_config_is_named(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r'model_config old/none\.py does not exist'):
        RUNNERS.build(config(yard, monkeypatch, model_config='old/none.py'))


def test_a_model_of_another_kind_is_named(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (yard / 'old/depth.py').write_text("model = dict(type='DepthEstimator')")
    with pytest.raises(ValueError, match=r"depth\.py: expected .*or CascadeEncoderDecoder, found 'DepthEstimator'"):
        RUNNERS.build(config(yard, monkeypatch, model_config='old/depth.py'))


def test_preprocessing_and_imports_come_along(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Config.fromfile(yard / 'old/config.py')
    preprocessor = trained.model.pop('data_preprocessor')
    trained.dump(yard / 'old/config.py')
    with pytest.raises(ValueError, match='has no data_preprocessor'):
        RUNNERS.build(config(yard, monkeypatch))
    trained.merge_from_dict(
        # A text, as in mmseg's own configs of ConvNeXt.
        dict(data_preprocessor=preprocessor, custom_imports=dict(imports='json'))
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


def change_checkpoint(path: Path, change: Callable[[dict], object]) -> None:
    checkpoint = load_checkpoint_safely(path)
    change(checkpoint)
    torch.save(checkpoint, path)


def test_older_checkpoints_name_their_classes_in_capitals(
    yard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_checkpoint(yard / 'old/model.pth', lambda c: c.update(meta=dict(CLASSES=tuple(OLD[::-1]))))
    with pytest.raises(ValueError, match=r"was trained on classes \['person'"):
        RUNNERS.build(config(yard, monkeypatch))


def test_a_deeper_model_is_not_cut_to_the_config(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {'backbone.layer4.2.conv1.weight': torch.zeros(1)}
    change_checkpoint(yard / 'old/model.pth', lambda c: c['state_dict'].update(more))
    with pytest.raises(ValueError, match=r'layer4\.2\.conv1\.weight: not in the model'):
        RUNNERS.build(config(yard, monkeypatch))


def test_tensors_that_no_model_needs_do_not_matter(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = 'decode_head.loss_decode.class_weight', 'backbone.bn9.num_batches_tracked', 'ema_steps'
    more = dict.fromkeys(names, torch.zeros(1))
    change_checkpoint(yard / 'old/model.pth', lambda c: c['state_dict'].update(more))
    RUNNERS.build(config(yard, monkeypatch))


def test_auxiliary_heads_may_be_left_out(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = RUNNERS.build(config(yard, monkeypatch, **{'model.auxiliary_head': None}))
    assert runner.cfg.model.auxiliary_head is None


def test_weights_that_are_not_finite_are_refused(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(checkpoint: dict) -> None:
        checkpoint['state_dict']['decode_head.conv_seg.weight'][0] = float('nan')

    change_checkpoint(yard / 'old/model.pth', spoil)
    with pytest.raises(ValueError, match=r'not finite in decode_head\.conv_seg\.weight'):
        RUNNERS.build(config(yard, monkeypatch))


def test_a_head_of_boundaries_is_named(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Config.fromfile(yard / 'old/config.py')
    trained.model.auxiliary_head.num_classes = 2
    trained.dump(yard / 'old/config.py')
    with pytest.raises(ValueError, match=r'FCNHead has 2 channels.*auxiliary_head=None'):
        RUNNERS.build(config(yard, monkeypatch))
    RUNNERS.build(config(yard, monkeypatch, **{'model.auxiliary_head': None}))


def test_tests_at_another_size_are_told(
    yard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize = dict(type='Resize', scale=(64, 32), keep_ratio=True)
    (yard / 'old/config.py').open('a').write(f'\ntest_pipeline = [{resize!r}]\n')
    def note(cfg: Config) -> str | None:
        protocol = Protocol('5-3', 8)
        return note_on_sizes(build_stage_config(cfg, protocol, protocol.stage(1), yard / 'run'))

    cfg = config(yard, monkeypatch)
    assert "after [{'type': 'Resize'" in note(cfg)
    cfg.test_pipeline.insert(1, resize)
    assert note(cfg) is None


def test_auxiliary_heads_do_not_unlearn_what_the_method_keeps(
    yard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(yard, monkeypatch, segmentation_loss=dict(type='UnbiasedCrossEntropyLoss', num_old='$num_old'))
    stage = build_stage_config(cfg, Protocol('5-3', 8), Protocol('5-3', 8).stage(1), yard / 'run')
    own = stage.model.auxiliary_head.loss_decode
    assert (own.type, own.num_old, own.loss_weight) == ('UnbiasedCrossEntropyLoss', 6, 0.4)
    plain = config(yard, monkeypatch)
    stage = build_stage_config(plain, Protocol('5-3', 8), Protocol('5-3', 8).stage(1), yard / 'run')
    assert stage.model.auxiliary_head.loss_decode.type == 'CrossEntropyLoss'


@pytest.mark.parametrize(
    ('batch_size', 'processes', 'refused'),
    [
        (4, 1, ''),
        (5, 1, 'in batches of 5 leave one image for the last, '),
        # Six images in batches of twice two leave one for each process.
        (2, 2, 'in batches of 2 on each of 2 processes leave one image for a process in the last, '),
        (5, 2, ''),
    ],
)
def test_a_last_batch_of_one_image_is_found_before_training(
    yard: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, processes: int, refused: str
) -> None:
    for number, path in enumerate(sorted((yard / 'data/yard/rgb/train').iterdir())):
        if number >= 6:
            path.unlink()
    trained = Config.fromfile(yard / 'old/config.py')
    trained.model.decode_head = dict(trained.model.decode_head, type='PSPHead', pool_scales=(1, 2))
    for unread in ('num_convs', 'concat_input'):
        trained.model.decode_head.pop(unread)
    trained.dump(yard / 'old/config.py')
    init_default_scope('mmseg')
    state_dict = MODELS.build(dict(trained.model, pretrained=None)).state_dict()
    torch.save(dict(meta={}, state_dict=state_dict), yard / 'old/model.pth')
    options = dict(batch_size=batch_size, distillation=dict(attention=None, output=None))
    monkeypatch.setattr('mmseg_sats.engine.checks.data.get_world_size', lambda: processes)
    if not refused:
        RUNNERS.build(config(yard, monkeypatch, **options))
        return
    with pytest.raises(ValueError, match=f'stage 1: 6 images {refused}'):
        RUNNERS.build(config(yard, monkeypatch, **options))
    endless = {'train_dataloader.sampler.type': 'InfiniteSampler'}
    for without in ({'train_dataloader.drop_last': True}, dict(iters=1), endless):
        RUNNERS.build(config(yard, monkeypatch, **options | without))
    with pytest.raises(ValueError, match=f'stage 1: 6 images {refused}'):
        RUNNERS.build(config(yard, monkeypatch, **options, iters=2))
    if processes > 1:  # synchronised norms see the images of all processes
        RUNNERS.build(config(yard, monkeypatch, **options, sync_bn='torch'))
        synchronised = {'model.decode_head.norm_cfg': dict(type='SyncBN', requires_grad=True)}
        RUNNERS.build(config(yard, monkeypatch, **options | synchronised))


TINY = ['model.backbone.embed_dims=8', 'model.backbone.num_layers=[1,1,1,1]', 'model.backbone.num_heads=[1,1,1,1]',
        'model.decode_head.in_channels=[8,8,8,8]', 'model.decode_head.channels=8', 'norm_cfg.type=BN',
        'model.backbone.init_cfg=None']  # fmt: skip


def test_data_without_background_word_by_word(drawn: list[tuple[Path, Path]], tmp_path: Path) -> None:
    """The section's config and commands, on masks whose 0 is a class and whose background is 255."""
    (config,) = [block for block in code_blocks(PAGE, 'python') if 'no_background' in block]
    (tmp_path / 'street.py').write_text(config)
    write_street(drawn[:16], tmp_path / 'data/street', 'train')
    write_street(drawn[16:], tmp_path / 'data/street', 'val')
    check, train = [command for command in commands(PAGE) if 'street.py' in command]
    told = follow(tmp_path, check)
    assert '0 road > 1' in told
    assert 'val: no image shows background: once all classes are learned' in told
    follow(tmp_path, train, '--cfg-options', *SMALL, *TINY, 'report=None')
    results = json.loads((tmp_path / 'work_dirs/street/results.json').read_text())
    first, last = results['stages']
    assert first['new_classes'] == ['road', 'pavement', 'building', 'sky', 'car']
    assert first['iou']['background'] is not None  # the classes that are not seen yet
    assert last['iou']['background'] is None
    assert last['iou']['road'] is not None


def write_street(pairs: list[tuple[Path, Path]], root: Path, split: str) -> None:
    for image, mask in pairs:
        labels = read_mask(mask)
        (root / 'images' / split).mkdir(parents=True, exist_ok=True)
        (root / 'labels' / split).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, root / 'images' / split)
        cv2.imwrite(str(root / 'labels' / split / mask.name), np.where(labels == 0, 255, labels - 1).astype(np.uint8))

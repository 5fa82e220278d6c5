# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""`mmseg-sats add`: from any trained mmseg model and folders of images to a model that knows more classes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from safetensors.torch import load_file

from mmseg_sats.api import add_classes, train
from mmseg_sats.api.class_table import match_classes, numbered
from mmseg_sats.api.old_images import picked_old_images, write_old_images
from mmseg_sats.api.old_model import read_old_model
from mmseg_sats.datasets.shapes.drawing import draw_scene
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from tests.foreign import read_mask, write_split
from tests.small_models import MIT, MIT_CHANNELS, RESNET, RESNET_CHANNELS, decode_head_cfg

OLD = ['road', 'grass', 'car']
SMALL = {'epochs': 1, 'num_workers': 0, 'report': None, 'rehearsal': None}
IN_STOCK_MMSEG = """
import sys
sys.modules['mmseg_sats'] = None
import torch
from mmseg.apis import init_model
model = init_model('config.py', 'model.pth', device='cpu')
image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
torch.save(model(image, mode='tensor'), 'logits.pth')
"""


def old_model(
    folder: Path, names: list[str], mit: bool = False, classes_in_checkpoint: bool = True,
    head: dict[str, Any] | None = None, **config: Any,
) -> tuple[Path, Path]:
    """A model from elsewhere with random weights: checkpoint and config."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone = dict(MIT, type='MixVisionTransformer') if mit else dict(RESNET)
    channels = MIT_CHANNELS if mit else RESNET_CHANNELS
    preprocessor = dict(
        type='SegDataPreProcessor', mean=[0.0] * 3, std=[255.0] * 3, bgr_to_rgb=True, size=(48, 48)
    )
    model = dict(
        type='EncoderDecoder', data_preprocessor=preprocessor, backbone=backbone,
        decode_head=head or decode_head_cfg(len(names), channels), train_cfg=dict(), test_cfg=dict(mode='whole'),
    )  # fmt: skip
    Config(dict(model=model, **config)).dump(folder / 'config.py')
    init_default_scope('mmseg')
    torch.manual_seed(0)
    meta = dict(dataset_meta=dict(classes=names)) if classes_in_checkpoint else {}
    torch.save(dict(meta=meta, state_dict=MODELS.build(model).state_dict()), folder / 'model.pth')
    return folder / 'model.pth', folder / 'config.py'


@pytest.fixture(scope='module')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Drawn scenes of five classes, as pairs of image and mask."""
    folder, pairs = tmp_path_factory.mktemp('scenes'), []
    for index in range(36):
        scene = draw_scene(index, split='train', num_classes=5, image_size=64, seed=0, classes_per_image=(2, 3))
        pair = (folder / f'{index}.jpg', folder / f'{index}.png')
        for path, array in zip(pair, scene, strict=True):
            cv2.imwrite(str(path), array)
        pairs.append(pair)
    return pairs


@pytest.fixture
def data(scenes: list[tuple[Path, Path]], tmp_path: Path) -> Path:
    """New classes 4 and 5 as 1 and 2; old images numbered as the old model's; all classes in val."""
    folder = tmp_path / 'data'
    write_split(scenes[:22], {4: 1, 5: 2}, folder, 'train', {4, 5})
    write_split(scenes[22:28], {1: 1, 2: 2, 3: 3}, folder, 'old', {1, 2, 3})
    write_split(scenes[28:], {n: n for n in range(1, 6)}, folder, 'val', set(range(1, 6)))
    return folder


def folders(data: Path, split: str, prefix: str = '') -> dict[str, Path]:
    return {f'{prefix}images': data / 'rgb' / split, f'{prefix}masks': data / 'labels' / split}


def test_without_background_to_a_model_that_stock_mmseg_runs(data: Path, tmp_path: Path) -> None:
    checkpoint, config = old_model(tmp_path / 'old', OLD, mit=True)
    out = tmp_path / 'out'
    added = add_classes(
        checkpoint, config, **folders(data, 'train'), classes='tree,house', **folders(data, 'val', 'val_'), out=out,
        **SMALL,
    )  # fmt: skip
    assert added.table.names == ('background', *OLD, 'tree', 'house')
    assert set(added.before) == {'background', *OLD}
    assert added.before['background'] is None
    assert None not in [added.after[name] for name in added.table.names[1:]]
    model = Config.fromfile(out / 'run/stage_1/config.py').model
    assert (model.backbone.type, model.decode_head.type) == ('AttentionMixVisionTransformer', 'LeanSegformerHead')
    assert {path.name for path in out.iterdir()} >= {
        'config.py', 'model.pth', 'model.safetensors', 'README.md', 'add_classes.py', 'add_classes.json'
    }
    subprocess.run([sys.executable, '-W', 'ignore', '-c', IN_STOCK_MMSEG], cwd=out, check=True, capture_output=True)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = added.run.model()(image, mode='tensor')
    torch.testing.assert_close(torch.load(out / 'logits.pth'), expected, rtol=1e-5, atol=1e-6)
    weights = load_checkpoint_safely(out / 'model.pth')['state_dict']
    same = load_file(out / 'model.safetensors')
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[key], same[key]) for key in same)
    # The config that is kept does the same run.


    again = train(out / 'add_classes.py', work_dir=tmp_path / 'again')
    assert again.results['stages'] == added.run.results['stages']


def test_old_images_of_their_own_numbers_are_replayed(data: Path, tmp_path: Path) -> None:
    checkpoint, config = old_model(tmp_path / 'old', ['background', *OLD])
    added = add_classes(
        checkpoint, config, **folders(data, 'train'), classes='tree,house', **folders(data, 'old', 'old_'),
        **folders(data, 'val', 'val_'), out=tmp_path / 'out', **SMALL,
    )  # fmt: skip
    count = len(list((data / 'rgb/old').iterdir()))
    cfg = Config.fromfile(tmp_path / 'out/run/config.py')
    assert cfg.memory == count
    assert cfg.distillation.attention.source == 'feature'
    assert cfg.distillation.output is not None
    kept = json.loads((tmp_path / 'out/run/stage_0/exemplars.json').read_text())['exemplars']
    assert len(kept) == count
    assert added.before['road'] is not None
    figures = json.loads((tmp_path / 'out/add_classes.json').read_text())
    assert figures['before'] == added.before
    card = (tmp_path / 'out/README.md').read_text()
    head = yaml.safe_load(card.split('---')[1])
    assert head['library_name'] == 'mmsegmentation'
    result = head['model-index'][0]['results'][0]['metrics'][0]
    assert result['value'] == round(added.mean(added.table.names), 2)
    assert '| 4 | tree | new | - |' in card
    assert 'mmseg-sats add ' in card


def test_without_images_for_evaluation_a_fifth_is_kept(data: Path, tmp_path: Path) -> None:
    """Their masks show no old class, so nothing is said of those. And classes may be learned by iterations."""
    checkpoint, config = old_model(tmp_path / 'old', ['background', *OLD])
    added = add_classes(
        checkpoint, config, **folders(data, 'train'), classes='tree=1,house=2', out=tmp_path / 'out', iters=2,
        num_workers=0, report=None,
    )  # fmt: skip
    assert (tmp_path / 'out/run/stage_1/iter_2.pth').exists()
    train, val = ((tmp_path / f'out/{name}.txt').read_text().split() for name in ('train', 'val'))
    everything = {path.stem for path in (data / 'rgb/train').iterdir()}
    assert {*train, *val} == everything
    assert len(train) + len(val) == len(everything)
    assert len(val) == len(everything) // 5
    assert added.before['road'] is None
    assert added.after['road'] is None
    assert added.mean(added.table.new) is not None
    assert added.mean(added.table.old) is None
    assert added.unmeasured == tuple(OLD)
    with pytest.raises(ValueError, match='out is in use: it holds a run'):
        add_classes(checkpoint, config, **folders(data, 'train'), classes='tree,house', out=tmp_path / 'out')


def test_classes_are_matched_by_name() -> None:
    table = match_classes(['road', 'Potted Plant', 'car'], numbered('car=3,pottedplant=9,tree=4', 'classes'), True)
    assert table.matched == ('Potted Plant', 'car')
    assert table.new == ('tree',)
    assert table.names == ('background', 'road', 'Potted Plant', 'car', 'tree')
    assert table.protocol == '3-1'
    assert table.numbers_for_all() == {
        'background': 0, 'ignored': 255, 'road': 1, 'Potted Plant': 9, 'car': 3, 'tree': 4
    }
    rows = {row[0]: row[1:] for row in table.rows().rows}
    assert rows['road'] == [1, '-', 1, 'copied']
    assert rows['car'] == [3, 3, 3, 'copied, and learned further: it is drawn in your masks']
    assert rows['tree'] == ['-', 4, 4, 'made new']
    without = match_classes(['road'], {'tree': 0, 'background': 255}, False)
    assert without.numbers_for_all() == {'tree': 0, 'background': 255, 'ignored': 1, 'road': 2}
    assert without.rows().rows[0] == ['background', '-', 255, 0, 'made new: the old model has none']


@pytest.mark.parametrize(
    ('old', 'new', 'notes'),
    [(['person'], 'persons', 1), (['building'], 'bulding', 1), (['cat'], 'car', 0), (['cat'], 'cats', 1)],
)
def test_a_new_name_that_looks_like_an_old_one_is_noted(old: list[str], new: str, notes: int) -> None:
    assert len(match_classes(old, {new: 1}, True).look_alikes()) == notes


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('', 'expected names of classes'),
        ('tree,tree', "the name 'tree' appears twice"),
        ('tree=4,house=4', 'the number 4 appears twice'),
        ('tree=x', 'tree=x: expected NAME=NUMBER'),
        ('tree=256', r'tree=256: expected a number in 0\.\.255'),
    ],
)
def test_impossible_classes_are_named(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numbered(words, 'classes')


def test_matched_classes_keep_their_labels(
    scenes: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    """Images that show only known classes are replayed: nothing that is drawn is lost."""
    write_split(scenes[:22], {3: 7, 4: 1}, tmp_path / 'data', 'train', {3, 4})
    checkpoint, config = old_model(tmp_path / 'old', ['background', *OLD])
    add_classes(
        checkpoint, config, **folders(tmp_path / 'data', 'train'), classes='tree,car=7', out=tmp_path / 'out',
        **SMALL,
    )  # fmt: skip
    cfg = Config.fromfile(tmp_path / 'out/run/config.py')
    assert cfg.setting == 'sequential'
    trained = (tmp_path / 'out/train.txt').read_text().split()
    with_car = [name for name in trained if 7 in read_mask(tmp_path / f'data/labels/train/{name}.png')]
    assert cfg.memory == max(len(with_car), 3)
    table = Config.fromfile(tmp_path / 'out/run/stage_1/config.py').train_dataloader.dataset
    assert table.stage_images.dataset.mask_values == dict(tree=1, car=7)


ENCNET = dict(
    type='EncHead', in_channels=[RESNET_CHANNELS[3]], in_index=[3], channels=8, num_classes=3, norm_cfg=dict(type='BN')
)  # fmt: skip


@pytest.mark.parametrize('head', [None, ENCNET], ids=['SegformerHead', 'EncHead'])
def test_background_in_another_channel_moves_to_the_first(head: dict[str, Any] | None, tmp_path: Path) -> None:
    checkpoint, config = old_model(tmp_path / 'old', ['road', 'clutter', 'car'], head=head)
    old = read_old_model(checkpoint, config, background='clutter')
    assert old.classes == ('road', 'car')
    assert old.numbers == {'road': 0, 'background': 1, 'car': 2}
    moved = load_checkpoint_safely(old.base(tmp_path / 'out'))
    was = load_checkpoint_safely(checkpoint)['state_dict']
    assert moved['meta']['dataset_meta']['classes'] == ['background', 'road', 'car']
    for key, value in moved['state_dict'].items():
        expected = was[key][[1, 0, 2]] if 'conv_seg' in key or 'se_layer' in key else was[key]
        assert torch.equal(value, expected), key
    plain = read_old_model(*old_model(tmp_path / 'plain', ['background', 'road']))
    assert plain.base(tmp_path / 'out') == plain.checkpoint


def test_one_channel_for_two_classes_has_background_first(tmp_path: Path) -> None:
    head = decode_head_cfg(2, RESNET_CHANNELS, out_channels=1, threshold=0.5)
    files = old_model(tmp_path / 'old', ['background', 'crack'], head=head)
    old = read_old_model(*files)
    assert (old.classes, old.background) == (('crack',), 0)
    assert old.base(tmp_path / 'out') == files[0]
    files = old_model(tmp_path / 'other', ['wall', 'crack'], head=head)
    with pytest.raises(ValueError, match=r'one channel for its classes wall, crack: .* background=wall'):
        read_old_model(*files)
    renamed = load_checkpoint_safely(read_old_model(*files, background='wall').base(tmp_path / 'out'))
    assert renamed['meta']['dataset_meta']['classes'] == ['background', 'crack']
    was = load_checkpoint_safely(files[0])['state_dict']
    assert all(torch.equal(value, was[key]) for key, value in renamed['state_dict'].items())


def test_the_old_models_own_images_are_a_memory(scenes: list[tuple[Path, Path]], tmp_path: Path) -> None:
    """Named by its config, with numbers one above the channels where mmseg reduces them."""
    write_split(scenes, {1: 1, 2: 2, 3: 3}, tmp_path, 'old', {1, 2, 3})
    dataset = dict(
        type='BaseSegDataset', metainfo=dict(classes=OLD), data_root=str(tmp_path), reduce_zero_label=True,
        data_prefix=dict(img_path='rgb/old', seg_map_path='labels/old'), pipeline=[dict(type='LoadImageFromFile')],
    )  # fmt: skip
    loader = dict(batch_size=3, dataset=dict(type='RepeatDataset', times=2, dataset=dataset))
    old = read_old_model(*old_model(tmp_path / 'old', OLD, classes_in_checkpoint=False, train_dataloader=loader))
    assert old.channels == tuple(OLD)
    assert old.batch_size == 3
    assert old.numbers == dict(road=1, grass=2, car=3)
    pairs = picked_old_images(old, 6)
    assert len(pairs) == 6
    table = match_classes(old.classes, {'tree': 1, 'house': 2}, False)
    written = write_old_images(pairs, old.numbers, table, tmp_path / 'kept')
    numbers = table.numbers_for_all()
    for (image, mask), (kept_image, kept_mask) in zip(pairs, written.pairs, strict=True):
        assert Path(image).read_bytes() == Path(kept_image).read_bytes()
        labels, expected = read_mask(Path(mask)), np.zeros((64, 64), np.uint8)
        for name, number in old.numbers.items():
            expected[labels == number] = numbers[name]
        assert np.array_equal(read_mask(Path(kept_mask)), expected)
    with pytest.raises(ValueError, match='memory 2: expected at least one image for each of 3 old classes'):
        picked_old_images(old, 2)


def test_old_images_that_would_be_deleted_are_refused(tmp_path: Path) -> None:
    """The folder that keeps them is emptied first: what lies in it is nobody's source."""
    table = match_classes(OLD, {'tree': 1}, True)
    kept = tmp_path / 'old_images/images/a.jpg'
    kept.parent.mkdir(parents=True)
    kept.touch()
    with pytest.raises(ValueError, match=r'a\.jpg lies in .*old_images, which is made anew'):
        write_old_images([(str(kept), 'a.png')], dict(road=1), table, tmp_path / 'old_images')
    assert kept.exists()


def test_colours_of_known_classes_stay() -> None:
    table = match_classes(OLD, {'tree': 1}, False)
    colours = table.colours(dict(road=(1, 2, 3)))
    assert colours[:2] == [[0, 0, 0], [1, 2, 3]]
    assert len({tuple(colour) for colour in colours}) == len(table.names)


def test_pipelines_and_sizes_are_the_old_models(tmp_path: Path) -> None:
    train = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='RandomCrop', crop_size=(32, 48)),
        dict(type='PackSegInputs'),
    ]
    test = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(80, 40)), dict(type='PackSegInputs')]
    files = old_model(tmp_path, OLD, train_dataloader=dict(dataset=dict(pipeline=train)), test_pipeline=test)
    old = read_old_model(*files)
    assert old.crop_size == (32, 48)
    assert [step['type'] for step in old.pipeline('test_dataloader')] == [
        'LoadImageFromFile', 'Resize', 'LoadAnnotations', 'PackSegInputs'
    ]
    assert old.pipeline('train_dataloader')[1] == dict(type='LoadAnnotations')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(classes='road,car'), 'the old model has all of them'),
        (dict(classes='tree'), r'does not name the numbers \[2\] in the masks'),
        (dict(classes='tree,house,pond'), 'names pond with the number 3, which no mask'),
        (dict(val_images='x'), 'val_images goes with val_masks'),
        (dict(old_images='x', old_masks='x', memory=9), 'expected one of them'),
        (dict(memory=9), 'memory: the training data that .* names cannot be read'),
        (dict(method='satz'), "method='satz' is unknown .*did you mean 'sats'"),
        (dict(method='barm'), "method='barm': .* model.background_residuals, which stock mmseg cannot run"),
        (dict(background='sky'), 'background sky: the old model has no such class'),
        (dict(old_classes='road,grass'), 'has 3 channels, but its classes are 2'),
        (dict(checkpoint='none.pth'), 'the checkpoint of the old model, none.pth, does not exist'),
        (dict(images='none'), 'the folder of images .*none does not exist'),
    ],
)
def test_what_is_wrong_is_named_before_training(
    data: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    checkpoint, config = old_model(tmp_path / 'old', OLD)
    given = dict(checkpoint=checkpoint, config=config, **folders(data, 'train'), classes='tree,house')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        add_classes(**(given | options), out=tmp_path / 'out', **SMALL)
    assert not (tmp_path / 'out/run').exists()


def test_an_interrupted_run_goes_on(data: Path, tmp_path: Path) -> None:
    checkpoint, config = old_model(tmp_path / 'old', OLD)
    given = (checkpoint, config, *folders(data, 'train').values(), 'tree,house')
    with pytest.raises(FileNotFoundError, match='nothing to resume'):
        add_classes(*given, out=tmp_path / 'out', resume=True)
    first = add_classes(*given, out=tmp_path / 'out', **SMALL)
    (tmp_path / 'out/model.pth').unlink()
    (tmp_path / 'out/run/stage_1/done').unlink()
    second = add_classes(*given, out=tmp_path / 'out', resume=True)
    assert second.after == first.after
    assert (tmp_path / 'out/model.pth').is_file()
    with pytest.raises(ValueError, match='is in use'):
        add_classes(*given, out=tmp_path / 'out', **SMALL)


def test_prototypes_need_images_of_the_old_classes(data: Path, tmp_path: Path) -> None:
    checkpoint, config = old_model(tmp_path / 'old', OLD)
    with pytest.raises(ValueError, match=r'prototypes are means over .* also of a stage 0 that is not trained: .* no'):
        add_classes(checkpoint, config, **folders(data, 'train'), classes='tree,house', method='star',
                    out=tmp_path / 'out', **SMALL)  # fmt: skip

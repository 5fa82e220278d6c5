# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Bad input, each with its message, found by the command line before any training starts."""

import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmseg.registry import MODELS
from PIL import Image

from mmseg_sats.engine import IncrementalRunner, StageRunner
from mmseg_sats.models import AttentionMixVisionTransformer
from mmseg_sats.utils.checkpoint import write_text
from tools.train_incremental import main

ROOT = Path(__file__).parents[1]
IMAGES = 12
CONFIG = """
_base_ = ['{configs}/_base_/segformer_tiny_shapes.py', '{configs}/sats/sats.py']
protocol = '3-1'
data_root = '{data}'
class_names = ['background', 'a', 'b', 'c', 'd', 'e', 'f']
train_dataset = dict(
    _delete_=True, type='BaseSegDataset', data_root='$data_root', ann_file='train.txt',
    data_prefix=dict(img_path='images', seg_map_path='masks'), img_suffix='.png',
    metainfo=dict(classes='$class_names'), pipeline='$train_pipeline')
eval_dataset = dict(
    _delete_=True, type='BaseSegDataset', data_root='$data_root', ann_file='val.txt',
    data_prefix=dict(img_path='images', seg_map_path='masks'), img_suffix='.png',
    metainfo=dict(classes='$class_names'), pipeline='$eval_pipeline')
epochs, crop_size, batch_size = 1, 32, 4
rehearsal = None
"""


def draw(folder: Path) -> None:
    """12 images of 32 x 32 with all six classes, in a training and an evaluation list."""
    draws = np.random.default_rng(0)
    for name in ('images', 'masks'):
        (folder / name).mkdir(parents=True)
    for number in range(IMAGES):
        mask = np.zeros((32, 32), np.uint8)
        mask[:8] = 1 + number % 6
        mask[8:16] = 1 + (number + 1) % 6
        Image.fromarray(mask).save(folder / f'masks/{number}.png')
        image = draws.integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(image).save(folder / f'images/{number}.png')
    for name in ('train', 'val'):
        (folder / f'{name}.txt').write_text(''.join(f'{number}\n' for number in range(IMAGES)))


class Place(NamedTuple):
    """What a case may change: the data, the config file, the work dir."""

    data: Path
    config: Path
    work_dir: Path

    def mask(self, array: np.ndarray) -> None:
        Image.fromarray(array).save(self.data / 'masks/3.png')

    def add(self, text: str) -> None:
        self.config.write_text(self.config.read_text() + text)

    def change(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))


def shift(place: Place) -> None:
    """The masks' numbers less by one, so that 0 is the first class."""
    for path in place.data.glob('masks/*'):
        mask = np.array(Image.open(path))
        Image.fromarray(mask - (mask > 0)).save(path)


def turn(place: Place) -> None:
    """A picture and its mask that lie, of which the picture's EXIF says that it stands."""
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(place.data / 'images/3.png', exif=exif)
    place.mask(np.ones((16, 32), np.uint8))


OTHER_ORDER = """
eval_dataset['metainfo'] = dict(classes=['background', 'b', 'a', 'c', 'd', 'e', 'f'])
"""


LOAD, LABELS, PACK = (dict(type=name) for name in ('LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs'))


def other(place: Place) -> str:
    """Another name for the config, by which one beside it inherits from it."""
    place.config.with_name('other.py').write_text(place.config.read_text())
    return 'other'


class Case(NamedTuple):
    """What is wrong, what the message says, options of the command line, and what is spoilt first."""

    name: str
    message: str
    options: tuple[str, ...] = ()
    spoil: Callable[[Place], object] = lambda place: None
    words: tuple[str, ...] = ()


@pytest.fixture(scope='module')
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('bad') / 'data'
    draw(folder)
    return folder


@pytest.fixture
def place(drawn: Path, tmp_path: Path) -> Place:
    data = shutil.copytree(drawn, tmp_path / 'data')
    config = tmp_path / 'own.py'
    config.write_text(CONFIG.format(configs=ROOT / 'configs', data=data))
    return Place(data, config, tmp_path / 'run')


def save_base(place: Place, classes: int = 4, width: int = 16, names: list | None = None) -> None:
    """A checkpoint ``base.pth`` beside the config, of a model as in the config or not quite."""
    cfg = Config.fromfile(ROOT / 'configs/_base_/segformer_tiny_shapes.py')
    cfg.model.decode_head.update(num_classes=classes, norm_cfg=dict(type='BN'))
    cfg.model.decode_head.loss_decode = dict(type='CrossEntropyLoss')
    cfg.model.backbone.update(embed_dims=width, init_cfg=None)
    cfg.model.decode_head.in_channels = [width * heads for heads in (1, 2, 4, 8)]
    for key in ('pseudo_labeler', 'distillation'):
        cfg.model[key] = None
    cfg.model.update(classifier_init='balanced', data_preprocessor=None)
    meta = dict(dataset_meta=dict(classes=names)) if names else {}
    state = MODELS.build(cfg.model).state_dict()
    torch.save(dict(state_dict=state, meta=meta), place.config.with_name('base.pth'))


def cut_base(place: Place) -> None:
    save_base(place)
    path = place.config.with_name('base.pth')
    path.write_bytes(path.read_bytes()[:5000])


class Payload:
    """Pickled as a call of ``open``: what code in a file could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), 'w')


def hostile_base(place: Place) -> None:
    payload = Payload(place.config.with_name('executed'))
    torch.save(dict(state_dict={}, meta=payload), place.config.with_name('base.pth'))


def wider_encoder(place: Place) -> None:
    encoder = AttentionMixVisionTransformer(
        embed_dims=32, num_layers=[1] * 4, num_heads=[1, 2, 4, 8]
    )
    torch.save(dict(state_dict=encoder.state_dict()), place.config.with_name('mit.pth'))


def used(place: Place, *files: str) -> None:
    for file in files:
        (place.work_dir / file).parent.mkdir(parents=True, exist_ok=True)
        write_text(place.work_dir / file, '')


def other_run(place: Place) -> None:
    cfg = Config.fromfile(place.config)
    cfg.merge_from_dict(dict(seed=3, lr=0.5, num_workers=7, method=place.config.parent.name))
    used(place, 'stage_0/epoch_1.pth')
    write_text(place.work_dir / 'config.py', cfg.pretty_text)


BASE = ('--base', '{config.parent}/base.pth')
OPTIONS = '--cfg-options'
NAMES = ['background', 'a', 'c', 'b']
RESNET = """
model = dict(backbone=dict(_delete_=True, type='ResNet', depth=18, base_channels=4, stem_channels=4,
                           norm_cfg=dict(type='BN')),
             decode_head=dict(in_channels=[4, 8, 16, 32]))
"""
KERNELS = """
model = dict(decode_head=dict(
    _delete_=True, type='IterativeDecodeHead', num_classes='$num_channels', num_stages=1, kernel_update_head=[],
    kernel_generate_head=dict(type='FCNHead', in_channels=128, channels=32, in_index=3, num_classes='$num_channels')))
"""
CASCADE = """
model = dict(decode_head=[dict(type='FCNHead', in_channels=128, channels=32), dict(type='OCRHead')])
"""
CASES = [
    # the command line and the config's words
    Case('no config', r'config .*nothing\.py does not exist', words=('nothing.py',)),
    Case(
        'option misspelt',
        r"option epoch: the config has no 'epoch' \(did you mean 'epochs'\?\)",
        ('epoch=3',),
    ),
    Case(
        'nested option misspelt',
        r"modle\.type: .*'modle' \(did you mean 'model'",
        ('modle.type=X',),
    ),
    Case(
        'key misspelt',
        r"config key 'protocl' is read by nothing \(did you mean 'protocol'",
        spoil=lambda p: p.add("protocl = '5-1'\n"),
    ),
    Case(
        'key with letters exchanged',
        r"'train_cgf' is read by nothing \(did you mean 'train_cfg'",
        spoil=lambda p: p.add('train_cgf = dict(max_epochs=2)\n'),
    ),
    Case(
        'word undefined',
        r"train_cfg\.max_epochs='\$epoch'.*did you mean 'epochs'",
        ('train_cfg.max_epochs=$epoch',),
    ),
    Case('word for itself', r'stands for itself: lr -> lr', ('lr=$lr',)),
    Case(
        'part of the wrong kind',
        r'later_stages must be a dict',
        spoil=lambda p: p.add("later_stages = 'lr'\n"),
    ),
    # protocol and class order
    Case('protocol of no form', r"'3to1' is not of the form 'm-n'", ('protocol=3to1',)),
    Case('protocol from nothing', r"'0-1': both numbers .* at least 1", ('protocol=0-1',)),
    Case(
        'protocol too large',
        r"'9-1' starts with 9 classes, but there are only 6",
        ('protocol=9-1',),
    ),
    Case('split without joint', r"split='3-1' belongs to protocol 'joint' alone", ('split=3-1',)),
    Case('class order repeats', r'class_order repeats \[2\]', ('class_order=[1,2,2,4,5,6]',)),
    Case(
        'class order with 0',
        r'class_order names 0, which is background',
        ('class_order=[0,1,2,3,4,5]',),
    ),
    Case(
        'class order too short',
        r'class_order has 3 of 6 classes, \[4, 5, 6\] are missing',
        ('class_order=[1,2,3]',),
    ),
    Case('class order beyond', r'classes that do not exist: \[9\]', ('class_order=[1,2,3,4,5,9]',)),
    Case(
        'setting misspelt',
        r"setting='overlaped' is unknown \(did you mean 'overlapped'",
        ('setting=overlaped',),
    ),
    Case(
        'eval_future misspelt',
        r"eval_future='ignored' is unknown \(did you mean 'ignore'",
        ('eval_future=ignored',),
    ),
    Case(
        'eval_images misspelt',
        r"eval_images='sen' is unknown \(did you mean 'seen'",
        ('eval_images=sen',),
    ),
    # numbers and device
    Case('no epochs', r'epochs=0: expected a whole number from 1', ('epochs=0',)),
    Case('half an epoch', r'epochs=0\.5: expected a whole number from 1', ('epochs=0.5',)),
    Case('negative batch', r'batch_size=-4: expected a whole number from 1', ('batch_size=-4',)),
    Case('negative crop', r'crop_size=-64: expected a number of pixels', ('crop_size=-64',)),
    Case('flat crop', r'crop_size=\(64, 0\): expected a number of pixels', ('crop_size=(64,0)',)),
    Case(
        'negative workers', r'num_workers=-1: expected a whole number from 0', ('num_workers=-1',)
    ),
    Case('negative seed', r'seed=-1: expected a whole number from 0', ('seed=-1',)),
    Case('negative rate', r'lr=-0\.1: expected a number above 0', ('lr=-0.1',)),
    Case('no rate later', r'later_stages\.lr=0: expected a number above 0', ('later_stages.lr=0',)),
    Case(
        'no iterations',
        r'checkpoint_iters=0: expected a whole number from 1',
        ('checkpoint_iters=0',),
    ),
    Case('negative memory', r'memory=-1', ('memory=-1',)),
    Case('memory too small', r'memory=2', ('memory=2',)),
    Case('no GPU', r"device='cuda', but torch finds no GPU", ('device=cuda',)),
    Case('device misspelt', r"device='cud' is unknown \(did you mean 'cuda'", ('device=cud',)),
    Case('no GPU for mixed precision', r'mixed precision .* needs a GPU', words=('--amp',)),
    # the work dir
    Case(
        'work dir below a file',
        r'work dir .*own\.py/run cannot be written to',
        words=('--work-dir', '{config}/run'),
    ),
    Case(
        'work dir in use',
        r'is in use: it holds stage_0 \(finished\), stage_1 \(unfinished: epoch_2\.pth\)\. Resume that run',
        spoil=lambda p: used(p, 'stage_0/done', 'stage_1/epoch_2.pth'),
    ),
    Case(
        'another run resumed',
        r'holds another run: (?!.*num_workers)lr: 0\.5 there, 0\.002 in the config; seed: 3 there, 0 in the config\.',
        spoil=other_run,
        words=('--resume',),
    ),
    Case(
        'resume without its config',
        r'config\.py does not exist: without the config of the run',
        spoil=lambda p: used(p, 'stage_0/epoch_1.pth'),
        words=('--resume',),
    ),
    Case(
        'resume with a broken config',
        r'config\.py is no config that can be read',
        spoil=lambda p: (used(p, 'config.py'), write_text(p.work_dir / 'config.py', 'a = (')),
        words=('--resume',),
    ),
    # checkpoints to start from
    Case('base missing', r'base .*base\.pth: no such checkpoint', words=BASE),
    Case(
        'base cut off',
        r'base\.pth is not a checkpoint that can be read safely',
        spoil=cut_base,
        words=BASE,
    ),
    Case(
        'base with more classes',
        r'does not fit stage 0: it has 7 classes, which it does not name, stage 0 has 4 \(background, a, b, c\)',
        spoil=lambda p: save_base(p, classes=7),
        words=BASE,
    ),
    Case(
        'base with the classes of another data set',
        r'does not fit stage 0: it has 5 classes \(road, car, a, b, c\), stage 0 has 4 \(background, a, b, c\); '
        r"expected the same.* let class_names begin with background and then these, .* protocol='5-N'",
        spoil=lambda p: save_base(p, classes=5, names=['road', 'car', 'a', 'b', 'c']),
        words=BASE,
    ),
    Case(
        'base with background and another number of classes',
        r"it has 3 classes \(background, a, b\), stage 0 has 4 .* protocol='2-N'",
        spoil=lambda p: save_base(p, classes=3, names=['background', 'a', 'b']),
        words=BASE,
    ),
    Case(
        'base with other classes',
        r"trained on classes \['background', 'a', 'c', 'b'\], expected",
        spoil=lambda p: save_base(p, names=NAMES),
        words=BASE,
    ),
    Case(
        'base of another encoder',
        r'does not fit stage 0 .*backbone',
        spoil=lambda p: save_base(p, width=8),
        words=BASE,
    ),
    Case(
        'base that carries code',
        r'base\.pth is not a checkpoint that can be read safely',
        spoil=hostile_base,
        words=BASE,
    ),
    Case(
        'encoder missing',
        r'none\.pth do not exist.*convert-mit ORIGINAL',
        ('pretrained=none.pth',),
    ),
    Case(
        'encoder of another size',
        r'mit\.pth does not fit AttentionMix',
        ('pretrained={config.parent}/mit.pth',),
        spoil=wider_encoder,
    ),
    # data
    Case('no data', r'nowhere.*train\.txt does not exist', ('data_root=nowhere',)),
    Case('list missing', r'trian\.txt does not exist', ('train_dataset.ann_file=trian.txt',)),
    Case(
        'list empty',
        r'BaseSegDataset gives no images',
        spoil=lambda p: (p.data / 'val.txt').write_text(''),
    ),
    Case(
        'mask missing',
        r'masks/3\.png does not exist',
        spoil=lambda p: (p.data / 'masks/3.png').unlink(),
    ),
    Case(
        'image missing',
        r'images/3\.png does not exist',
        spoil=lambda p: (p.data / 'images/3.png').unlink(),
    ),
    Case(
        'mask in colour',
        r'masks/3\.png: expected a single-channel 8-bit.*found shape \(32, 32, 3\)',
        spoil=lambda p: p.mask(np.zeros((32, 32, 3), np.uint8)),
    ),
    Case(
        'mask of 16 bits',
        r'masks/3\.png: expected a single-channel 8-bit.*of u?int',
        spoil=lambda p: p.mask(np.zeros((32, 32), np.uint16)),
    ),
    Case(
        'mask of another size',
        r'images/3\.png is 32 x 32 \(width x height\), its mask .*masks/3\.png is 16 x 32',
        spoil=lambda p: p.mask(np.ones((32, 16), np.uint8)),
    ),
    Case(
        'mask cut off',
        r'masks/3\.png is unreadable',
        spoil=lambda p: (p.data / 'masks/3.png').write_bytes(
            (p.data / 'masks/3.png').read_bytes()[:60]
        ),
    ),
    Case(
        'mask that is text',
        r'masks/3\.png is unreadable',
        spoil=lambda p: (p.data / 'masks/3.png').write_text('0 1 2'),
    ),
    Case(
        'image that is text',
        r'images/3\.png is no image that can be read',
        spoil=lambda p: (p.data / 'images/3.png').write_text('hello'),
    ),
    Case(
        'label outside',
        r'masks/3\.png holds label 77 .*allowed are 0 \(background\), 1 to 6',
        spoil=lambda p: p.mask(np.full((32, 32), 77, np.uint8)),
    ),
    Case(
        'later stage empty',
        r'stage 1: none of 3 images .*train with the classes d \(4\)',
        spoil=lambda p: (p.data / 'train.txt').write_text('0\n1\n6\n'),
    ),
    Case(
        'list leaves the root',
        r'leaves the data root',
        spoil=lambda p: (p.data / 'train.txt').write_text('../../other/0\n'),
    ),
    Case(
        'list with an absolute path',
        r'/etc/0\.png leaves the data root',
        spoil=lambda p: (p.data / 'train.txt').write_text('/etc/0\n'),
    ),
    Case(
        'labels shifted',
        r'reduce_zero_label=True, which turns background into ignored',
        ('train_dataset.reduce_zero_label=True',),
    ),
    Case(
        'a class at label 0',
        r"BaseSegDataset: is label 0 background or 'a'.*background='a'.*no_background=True.*mask_values=dict\(a=",
        ("class_names=['a','b','c','d','e','f']", 'protocol=2-1'),
        spoil=lambda p: shift(p),
    ),
    Case('background misnamed', r"background='z': expected the class of label 0", ('background=z',)),
    Case(
        'masks of 0 and 255',
        r'0 and 255 alone, and 255 is ignored: .*mask_values=dict\(f=255\)',
        spoil=lambda p: [
            Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(path) for path in p.data.glob('masks/*')
        ],
    ),
    Case(
        'list with a byte order mark',
        r'train\.txt starts with a byte order mark',
        spoil=lambda p: (p.data / 'train.txt').write_text('0\n1\n', encoding='utf-8-sig'),
    ),
    Case(
        'the last batch dropped is the only one',
        r'stage 0: 8 images do not fill one batch of 16, and drop_last=True .* expected a smaller batch_size',
        ('batch_size=16', 'train_dataloader.drop_last=True'),
    ),
    Case(
        'the last batch dropped is the only one of a later stage',
        r'stage 1: 4 images do not fill one batch with 5 places for them beside those of replay',
        ('batch_size=10', 'memory=6'),
        spoil=lambda p: p.add("later_stages = {'train_dataloader.drop_last': True}\n"),
    ),
    Case(
        'data sets joined around stages',
        r'train_dataloader\.dataset is a ConcatDataset.*expected IncrementalDataset around it',
        spoil=lambda p: p.add(
            "train_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=['$train_dataset']))\n"
        ),
    ),
    Case(
        'a PNG turned by its EXIF',
        r'images/3\.png is 16 x 32 .* as it is loaded \(its EXIF orientation is 6\), its mask .* is 32 x 16',
        spoil=lambda p: turn(p),
    ),
    Case('no LoadAnnotations', r'pipeline needs LoadAnnotations', ('train_pipeline=[]',)),
    # model
    Case(
        'no attention to distil',
        r'ResNet does not give: expected a backbone with forward_with_attention',
        spoil=lambda p: p.add(RESNET),
    ),
    Case(
        'head that cannot grow',
        r'decode_head \(IterativeDecodeHead\) cannot grow: it does not classify each pixel',
        spoil=lambda p: p.add(KERNELS),
    ),
    Case(
        'list of heads',
        r"model\.decode_head must be the config of one head; .* dict\(type='CascadeHead', heads=\[...\]\)",
        spoil=lambda p: p.add(CASCADE),
    ),
    Case(
        'argument misspelt',
        r"unexpected keyword argument 'embed_dim' \(did you mean 'embed_dims'",
        ('model.backbone.embed_dim=16',),
    ),
    Case(
        'loss misspelt',
        r"CRPDistilationLoss is not in .*did you mean 'CRPDistillationLoss'",
        ('distillation.attention.type=CRPDistilationLoss',),
    ),
    Case(
        'initialisation misspelt',
        r"classifier_init='balancd' is unknown \(did you mean 'balanced'",
        ('classifier_init=balancd',),
    ),
    Case(
        'threshold misspelt',
        r"'medain' is unknown.*did you mean 'median'",
        ('pseudo_labeler.threshold=medain',),
    ),
    Case(
        'base named by an option',
        r'base /nowhere/model\.pth: no such checkpoint',
        ('base=/nowhere/model.pth',),
    ),
    Case(
        'checkpointing that does nothing',
        r'does not reach the layers of AttentionMixVisionTransformer: expected model\.backbone\.with_cp',
        ("activation_checkpointing=['backbone.layers.0']",),
    ),
    Case(
        'a negative weight of a loss',
        r'model\.distillation\.attention\.loss_weight=-1\.0: expected a number from 0',
        ('distillation.attention.loss_weight=-1.0',),
    ),
    Case(
        'a text for the weight of a loss',
        r"model\.decode_head\.loss_decode\.loss_weight='one': expected a number from 0",
        ('segmentation_loss.loss_weight=one',),
    ),
    Case('a second seed', r'randomness\.seed=3 beside seed=0: expected seed alone', ('randomness.seed=3',)),
    Case(
        'a second size of the memory',
        r'memory_selection\.size=3 would not be used: expected memory',
        ('memory=6', 'memory_selection.size=3'),
    ),
    Case('a rate without end', r'lr=inf: expected a number above 0', spoil=lambda p: p.add('lr = float("inf")\n')),
    # what the later stages alone are trained with; test_rehearsal.py has the optimizer and the hooks
    Case(
        'transform misspelt',
        r'NoTransform is not in the',
        spoil=lambda p: p.add("later_stages = dict(eval_pipeline=[dict(type='NoTransform')])\n"),
    ),
    Case(
        'value of a stage misspelt',
        r"later_stages\.lrr is read by nothing \(did you mean 'lr'",
        ('later_stages.lrr=1',),
    ),
    Case(
        'value of the run for some stages',
        r'later_stages\.protocol: all stages of a run have the same protocol',
        ('later_stages.protocol=2-2',),
    ),
    Case('no epochs by the loop', r'train_cfg\.max_epochs=0', ('train_cfg.max_epochs=0',)),
    Case('negative rate of the head', r'head_lr_mult=-1: expected a number from 0', ('head_lr_mult=-1',)),
    Case('resume that is a text', r"resume='no': expected True or False", ('resume=no',)),
    Case(
        'unknown class that there is not',
        r"classifier_init='unknown' .* expected unknown=True",
        ('classifier_init=unknown',),
    ),
    Case(
        'part left out misspelt',
        r"distillation\.atention=None leaves nothing out \(did you mean 'attention'",
        ('distillation.atention=None',),
    ),
    Case(
        "a method's key misspelt in the file",
        r"config key 'pseudo_labeller' is read by nothing \(did you mean 'pseudo_labeler'",
        spoil=lambda p: p.add('pseudo_labeller = None\n'),
    ),
    Case(
        'two classes of one name',
        r'names a more than once: expected a name of its own',
        ("class_names=['background','a','a','c','d','e','f']",),
    ),
    Case(
        'evaluation with the classes in another order',
        r"test_dataloader of stage 0 has the classes .*'b', 'a'.*: expected those of the run's other data",
        spoil=lambda p: p.add(OTHER_ORDER),
    ),
    Case(
        'protocol of the evaluation',
        r'test_dataloader of stage 0 has the stages \[\[6, 5, 4\], \[3\]',
        ('test_dataloader.dataset.class_order=[6,5,4,3,2,1]',),
    ),
    # evaluation
    Case(
        'metric misspelt',
        r"IncrementalIoUMetrik is not in .*did you mean 'IncrementalIoUMetric'",
        ('test_evaluator.type=IncrementalIoUMetrik',),
    ),
    Case(
        'argument of the metric misspelt',
        r"unexpected keyword argument 'num_bases'",
        ('test_evaluator.num_bases=2',),
    ),
    Case(
        'another metric alone',
        r'test_evaluator has IoUMetric: expected an IncrementalIoUMetric',
        ('test_evaluator.type=IoUMetric',),
    ),
    Case(
        'two metrics of one key',
        r"IncrementalIoUMetric and IoUMetric both give mIoU: expected another prefix",
        spoil=lambda p: p.add("test_evaluator = [dict(type='IncrementalIoUMetric'), dict(type='IoUMetric')]\n"),
    ),
    Case(
        'source misspelt',
        r"source='features' is unknown \(did you mean 'feature'",
        ('distillation.attention.source=features',),
    ),
    # What public issues of mmsegmentation and mmengine tell of.
    Case(
        'labels mixed by a transform',  # mmsegmentation 3399
        r'the training pipeline: RandomRotFlip mixes the labels of neighbouring pixels: .* such as RandomRotate',
        spoil=lambda p: p.add(f'train_pipeline = {[LOAD, LABELS, dict(type="RandomRotFlip"), PACK]}\n'),
    ),
    Case(
        'several images mixed by a transform',  # mmsegmentation 1677
        r'RandomMosaic mixes several images, and the transforms of a stage see one at a time',
        spoil=lambda p: p.add(f'train_pipeline = {[LOAD, LABELS, dict(type="RandomMosaic", prob=1.0), PACK]}\n'),
    ),
    Case(
        'several images mixed by a data set',
        r'dataset must be .*, got MultiImageMixDataset',
        spoil=lambda p: p.add("train_dataset = dict(_delete_=True, type='MultiImageMixDataset', pipeline=[])\n"),
    ),
    Case(
        'schedule without its validation',  # mmengine 1124
        r'ReduceOnPlateauLR follows a validation, and stages have none: expected .* held_out',
        spoil=lambda p: p.add("param_scheduler = [dict(type='ReduceOnPlateauLR', monitor='mIoU')]\n"),
    ),
    Case(
        'inherited argument',  # mmsegmentation 1681
        r"LovaszLoss.*unexpected keyword argument 'use_sigmoid'; an inherited argument is left out by _delete_=True",
        ('segmentation_loss.type=LovaszLoss',),
    ),
    Case(
        'config of the other style',  # mmengine 1071
        r'own\.py cannot be read: the configs of this package are inherited by a line _base_ = ',
        spoil=lambda p: p.config.write_text(
            f'from mmengine.config import read_base\nwith read_base():\n    from .{other(p)} import *\n'
        ),
    ),
    Case(
        'key of mmseg 0.x',
        r"config key 'lr_config' is of mmseg 0\.x and has no effect: expected param_scheduler",
        spoil=lambda p: p.add("lr_config = dict(policy='poly')\n"),
    ),
    Case(
        'data of mmseg 0.x',
        r"config key 'data' is of mmseg 0\.x and has no effect: expected batch_size",
        spoil=lambda p: p.add('data = dict(samples_per_gpu=2)\n'),
    ),
    Case(
        'name of a key in place of its value',  # mmsegmentation 3652
        r"train_dataset\.pipeline='train_pipeline' is the name of a key: expected its value, '\$train_pipeline'",
        ('train_dataset.pipeline=train_pipeline',),
    ),
    Case(
        'a text in place of a loader',
        r"test_dataloader='val_dataloader': expected a dict",
        ('test_dataloader=val_dataloader',),
    ),
]


@pytest.mark.parametrize('case', CASES, ids=[case.name.replace(' ', '_') for case in CASES])
def test_bad_input(case: Case, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def training(self: StageRunner) -> None:
        raise AssertionError('training has started')

    monkeypatch.setattr(StageRunner, 'train', training)
    monkeypatch.setattr(StageRunner, 'from_cfg', training)
    case.spoil(place)
    words = [word.format(config=place.config) for word in case.words]
    config = words.pop(0) if words and words[0].endswith('.py') else str(place.config)
    if '--work-dir' not in words:
        words += ['--work-dir', str(place.work_dir)]
    if case.options:
        words += [OPTIONS, *(option.format(config=place.config) for option in case.options)]
    monkeypatch.setattr(sys, 'argv', ['train_incremental.py', config, *words])
    with pytest.raises(SystemExit, match=case.message) as stopped:
        main()
    assert '\n' not in str(stopped.value).strip()
    assert not (place.config.with_name('executed')).exists()


def test_the_unspoilt_case_reaches_training(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def training(self: StageRunner) -> None:
        raise AssertionError('training has started')

    monkeypatch.setattr(StageRunner, 'train', training)
    for words in ([], ['--resume']):  # what was refused above is accepted where nothing is wrong
        arguments = ['train', str(place.config), '--work-dir', str(place.work_dir), *words]
        monkeypatch.setattr(sys, 'argv', [*arguments, OPTIONS, 'device=None', 'num_workers=0'])
        with pytest.raises(AssertionError, match='training has started'):
            main()


UNUSUAL = {
    'classes numbered by a plain data set in its own way': (
        "class_names = ['a', 'b', 'c', 'd', 'e', 'f']\nmask_values = dict(a=1, b=2, c=3, d=4, e=6, f=5)"
    ),
    'a hook that looks for the visualizer': "default_hooks = dict(visualization=dict(type='SegVisualizationHook'))",
    'a schedule without an end': (
        'param_scheduler = [dict(type="LinearLR", start_factor=0.1, begin=0, end=1), '
        'dict(type="CosineAnnealingLR", begin=1)]\nepochs = 3'
    ),
    'a dotted value of later stages': "later_stages = {'optim_wrapper.optimizer.weight_decay': 0.5}",
    'a value that a hook of the user reads': 'later_stages = dict(my_hook_factor=3)',
    'a part in place of another': (
        "distillation = dict(attention=None, attention_mine=dict(type='CRPDistillationLoss', loss_weight=1.0))"
    ),
    'words of the user': 'scale_h = 3\nscale_w = 4',
    'a head that is held': 'head_lr_mult = 0',
    'a second metric': (
        "test_evaluator = [dict(type='IncrementalIoUMetric'), dict(type='IoUMetric', prefix='stock')]"
    ),
}


@pytest.mark.parametrize('text', UNUSUAL.values(), ids=[name.replace(' ', '_') for name in UNUSUAL])
def test_what_is_unusual_is_not_refused(text: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.add(f'\n{text}\n')
    monkeypatch.setattr(sys, 'argv', ['train', str(place.config), '--work-dir', str(place.work_dir)])
    monkeypatch.setattr(IncrementalRunner, 'train', lambda self: None)
    main()


def test_a_cut_off_image_is_named_in_the_middle_of_training(place: Place) -> None:
    content = (place.data / 'images/3.png').read_bytes()
    (place.data / 'images/3.png').write_bytes(content[:200])
    cfg = Config.fromfile(place.config)
    cfg.work_dir = str(place.work_dir)
    with pytest.raises(RuntimeError, match=r'images/3\.png with mask .* cannot be used'):
        RUNNERS.build(cfg).train()


def test_a_full_disk_gives_one_message(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(logging, 'raiseExceptions', True)
    arguments = ['train', str(place.config), '--work-dir', str(place.work_dir)]
    monkeypatch.setattr(sys, 'argv', arguments)
    message = r'config\.py was not written \(No space left on device\).*Make room .*--resume'
    with pytest.raises(SystemExit, match=message):
        main()
    assert [path.name for path in place.work_dir.iterdir()] == []

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Starts of new rows that look at a stage's images: what they see, how often, and that it lasts through a resume."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner
from mmseg.models import EncoderDecoder
from mmseg.registry import DATASETS, MODELS
from torch import Tensor, nn

from mmseg_sats.engine.config.method_hooks import hooks_of_parts
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.files.snapshot import write_weights
from mmseg_sats.engine.hooks.methods import new_rows_hook
from mmseg_sats.engine.hooks.methods.new_rows_hook import NewRowsHook, windows
from mmseg_sats.engine.hooks.methods.pretuning import _loader_cfg, pretune
from mmseg_sats.models.heads.new_rows import PretunedStart, RowMixture
from mmseg_sats.models.segmentors.old_model import ClassifierInputs
from mmseg_sats.protocol import Protocol
from mmseg_sats.utils.checkpoint import load_checkpoint_safely, read_arrays
from mmseg_sats.utils.randomness import seeded
from tests.small_models import build
from tests.test_distributed import run as run_processes

MakeConfig = Callable[..., Config]
Rows = tuple[Tensor, Tensor]
OLD, NEW = 4, 3
ROOT = Path(__file__).parents[1]


@HOOKS.register_module()
class Starts(Hook):
    """Notes the classifier that stage 1 is trained from, and stops it where it is told to."""

    priority = 'LOWEST'
    rows: Rows | None = None
    stop = False

    def before_stage(self, runner: Runner, stage: Any) -> None:
        classifier = runner.model.decode_head.conv_seg
        Starts.rows = classifier.weight.detach().flatten(1).clone(), classifier.bias.detach().clone()

    def before_train_iter(self, runner: Runner, **_: Any) -> None:
        if Starts.stop and runner.epoch == 1:
            raise KeyboardInterrupt


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """How many images each pass was shown."""
    count: Counter = Counter()
    inner = new_rows_hook.ClassifierInputs.__call__

    def counted(self: ClassifierInputs, inputs: Tensor) -> Tensor:
        count['images'] += len(inputs)
        return inner(self, inputs)

    monkeypatch.setattr(new_rows_hook.ClassifierInputs, '__call__', counted)
    yield count
    Starts.stop = False


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of stage 0 of 3-3 with random weights, which sees every old class somewhere."""
    protocol = Protocol('3-3', num_classes=6)
    cfg = Config.fromfile(ROOT / 'configs/finetune/segformer_tiny_shapes_3-1.py')
    model = build(build_stage_config(cfg, protocol, protocol.stages[0], '').model)
    path = tmp_path_factory.mktemp('base') / 'base.pth'
    write_weights(path, model.state_dict(), {})
    return path


@pytest.fixture
def train(shapes_cfg: MakeConfig, base: Path) -> Callable[..., Config]:
    """Trains stage 1 of 3-3 from a stage 0 that is there already; returns its config."""

    def run(name: str = 'run', **options: Any) -> Config:
        start = options.pop('classifier_init')
        small = dict(image_size=48, crop_size=48, train_images=16, val_images=4, batch_size=4, base=str(base))
        cfg = shapes_cfg('finetune', name, protocol='3-3', **small | options)
        cfg.classifier_init, cfg.custom_hooks = start, [dict(type='Starts')]
        RUNNERS.build(cfg).train()
        return Config.fromfile(Path(cfg.work_dir) / 'stage_1/config.py')

    return run


def pixels_of_new_classes(cfg: Config) -> tuple[nn.Module, list[tuple[int, Tensor, Tensor]]]:
    """The stage's model, and (new class, the old classifier's input, its output) of each pixel of a new class."""
    model = MODELS.build(cfg.model)
    old = model.old_model.model
    dataset = cfg.train_dataloader.dataset
    dataset = DATASETS.build(dict(dataset.get('stage_images', dataset), pipeline=cfg.test_pipeline))
    found = []
    for item in dataset:
        data = model.data_preprocessor(dict(inputs=[item['inputs']], data_samples=[item['data_samples']]), False)
        inputs: list[Tensor] = []
        handle = old.decode_head.conv_seg.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0]))
        with torch.no_grad():
            logits = old.decode_head(old.extract_feat(data['inputs']))
        handle.remove()
        labels = data['data_samples'][0].gt_sem_seg.data.float()[None]
        labels = F.interpolate(labels, logits.shape[2:], mode='nearest').long()[0, 0]
        for y, x in (labels >= OLD).logical_and(labels < OLD + NEW).nonzero().tolist():
            found.append((int(labels[y, x]) - OLD, inputs[0][0, :, y, x], logits[0, :, y, x]))
    return model, found


def old_rows(cfg: Config) -> Rows:
    state = load_checkpoint_safely(cfg.load_from)['state_dict']
    return state['decode_head.conv_seg.weight'].flatten(1), state['decode_head.conv_seg.bias']


def kept_rows(cfg: Config) -> Rows:
    with np.load(Path(cfg.work_dir) / 'new_rows.npz') as kept:
        return torch.from_numpy(kept['weight']).flatten(1), torch.from_numpy(kept['bias'])


def test_similar_rows_of_a_run(train: Callable[..., Config], seen: Counter) -> None:
    start = dict(type='similar', noise=0.0, frequency=0.05)
    cfg = train(classifier_init=start, memory=6, held_out=0.3, train_images=24)
    _, pixels = pixels_of_new_classes(cfg)
    dataset = DATASETS.build(cfg.train_dataloader.dataset.stage_images)
    assert seen['images'] == len(dataset)  # neither exemplars nor what is held out
    weight, bias = old_rows(cfg)
    found = kept_rows(cfg)
    assert all(torch.equal(*pair) for pair in zip(found, Starts.rows, strict=True))
    for index in range(NEW):
        said = [int(logits.argmax()) for c, _, logits in pixels if c == index]
        similar = [k for k in range(1, OLD) if said.count(k) > 0.05 * len(said)] or [0]
        theta = weight[similar]
        shares = (theta.mean(0) @ theta.T / theta.shape[1] ** 0.5).softmax(0)
        torch.testing.assert_close(found[0][OLD + index], shares @ theta)
        torch.testing.assert_close(found[1][OLD + index], shares @ bias[similar])
    torch.testing.assert_close(found[0][:OLD], weight)
    assert any(not torch.allclose(row, weight[0]) for row in found[0][OLD:])  # some old class was seen in them


def test_attributed_rows_of_a_run(train: Callable[..., Config]) -> None:
    cfg = train(classifier_init=dict(type='attributed', share=0.25))
    _, pixels = pixels_of_new_classes(cfg)
    weight, _ = old_rows(cfg)
    found, _ = kept_rows(cfg)
    count = round(0.25 * weight.shape[1])
    for index in range(NEW):
        mean = torch.stack([weight[0].double() * f.double() for c, f, _ in pixels if c == index]).mean(0)
        chosen = torch.zeros_like(mean).index_fill(0, mean.topk(count).indices, 1.0).bool()
        fresh = found[OLD + index] - weight[0] * chosen
        # mmseg draws fresh rows with a standard deviation of 0.01.
        assert fresh.std() < 0.015
        assert (found[OLD + index][chosen] - weight[0][chosen]).std() < 0.015
    assert weight[0].abs().max() > 0.05


def test_a_resumed_run_does_not_look_again(train: Callable[..., Config], seen: Counter, tmp_path: Path) -> None:
    options = dict(classifier_init=dict(type='pretuned', epochs=1, align_norms=True), epochs=2)
    whole = train('whole', **options)
    first, images = Starts.rows, seen.pop('images')
    Starts.stop = True
    with pytest.raises(KeyboardInterrupt):
        train('stopped', **options)
    assert seen.pop('images') == images
    Starts.stop, Starts.rows = False, None
    train('stopped', resume=True, **options)
    assert not seen
    assert all(torch.equal(*pair) for pair in zip(first, Starts.rows, strict=True))
    states = [
        load_checkpoint_safely(tmp_path / f'{name}/stage_1/snapshot.pth')['state_dict'] for name in ('whole', 'stopped')
    ]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    means = [rows.norm(dim=1).mean() for rows in first[0].split([OLD, NEW])]
    torch.testing.assert_close(*means)
    # Stopped before the file was there, it is made again alike.
    kept = kept_rows(whole)
    (tmp_path / 'stopped/stage_1/new_rows.npz').unlink()
    for name in ('done', 'metrics.json'):
        (tmp_path / 'stopped/stage_1' / name).unlink()
    train('stopped', resume=True, **options)
    assert all(torch.equal(*pair) for pair in zip(kept, Starts.rows, strict=True))


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'new_rows.npz'
    path.write_bytes(b'no rows')
    with pytest.raises(ValueError, match=r'new_rows\.npz does not hold the rows of a classifier'):
        read_arrays(path, ('weight', 'bias'), 'the rows of a classifier')


def test_a_stage_is_trained_on_its_own(train: Callable[..., Config], seen: Counter, tmp_path: Path) -> None:
    """By mmengine's Runner, which knows nothing of stages."""
    cfg = train(classifier_init='similar')
    kept, images = kept_rows(cfg), seen.pop('images')
    cfg.work_dir = str(tmp_path / 'alone')
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type == 'NewRowsHook']
    cfg.experiment_name = cfg.visualizer.name = 'alone'
    Runner.from_cfg(cfg).train()
    assert seen['images'] == images
    assert all(torch.equal(*pair) for pair in zip(kept, kept_rows(cfg), strict=True))


def reference(cfg: Config, start: PretunedStart, mixture: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The pre-tuning written out: cross-entropy in which background is any old class, and SGD with momentum."""
    model = MODELS.build(cfg.model)
    loader = Runner.build_dataloader(_loader_cfg(SimpleNamespace(cfg=cfg)), seed=seed)
    values = {name: value.clone().requires_grad_() for name, value in mixture.items()}
    weight, bias = old_rows(cfg)
    inputs_of, speeds, done = ClassifierInputs(model.old_model, 'conv_seg'), {}, 0
    for epoch in range(start.epochs):
        loader.sampler.set_epoch(epoch)
        loader.dataset.set_epoch(epoch)
        for batch in loader:
            data = model.data_preprocessor(batch, True)
            labels = torch.stack([sample.gt_sem_seg.data[0] for sample in data['data_samples']])
            features = inputs_of(data['inputs'])
            new = torch.stack([
                sum(values['projection'][c, k] * values['importance'][c, k] * weight[k] for k in range(OLD))
                for c in range(NEW)
            ])  # fmt: skip
            background = values['background_projection'] * values['background_importance'] * weight[0]
            rows, biases = torch.cat([background[None], weight[1:], new]), torch.cat([bias, values['bias']])
            logits = torch.einsum('bdhw,kd->bkhw', features, rows) + biases[:, None, None]
            logits = F.interpolate(logits, labels.shape[1:], mode='bilinear', align_corners=False)
            log_p = logits.log_softmax(1)
            chosen = log_p.gather(1, labels.clamp(max=OLD + NEW - 1)[:, None])[:, 0]
            chosen = torch.where(labels == 0, log_p[:, :OLD].logsumexp(1), chosen)
            loss = -chosen[labels != 255].sum() / labels.numel()
            gradients = torch.autograd.grad(loss, list(values.values()))
            lr = start.lr * (1 - done / (start.epochs * len(loader))) ** 0.9
            with torch.no_grad():
                for (name, value), gradient in zip(values.items(), gradients, strict=True):
                    gradient = gradient + start.weight_decay * value
                    speeds[name] = start.momentum * speeds.get(name, 0) + gradient
                    value -= lr * (gradient + start.momentum * speeds[name])
            done += 1
    return values


def test_pretuning_is_what_its_formulas_say(train: Callable[..., Config]) -> None:
    start = PretunedStart(epochs=2, lr=0.01)
    cfg = train(classifier_init=dict(type='pretuned', **dataclasses.asdict(start)))
    model = MODELS.build(cfg.model)
    weight, bias = old_rows(cfg)
    _, pixels = pixels_of_new_classes(cfg)
    means = torch.zeros(NEW, OLD, weight.shape[1], dtype=torch.float64)
    for index in range(NEW):
        own = [(f, logits.softmax(0)) for c, f, logits in pixels if c == index]
        means[index] = sum((weight * f > 0).double() * q[:, None] for f, q in own) / len(own)
    rows = torch.cat([weight, weight[:NEW]]), torch.cat([bias, bias[:NEW]])
    mixture = RowMixture(rows, means, torch.ones(NEW).bool())
    begin = {name: value.detach().clone() for name, value in mixture.named_parameters()}
    with seeded(0, 1, 3):
        expected = reference(cfg, start, begin, seed=0)
    for name, value in expected.items():
        assert not torch.allclose(value, begin[name], atol=1e-4), name
    with torch.no_grad():
        for name, value in mixture.named_parameters():
            value.copy_(expected[name])
        wanted = mixture()
    for found, value in zip(kept_rows(cfg), wanted, strict=True):
        torch.testing.assert_close(found, value, atol=2e-4, rtol=1e-3)
    # Encoder and old model are as they were.
    assert isinstance(model.new_rows.measured, PretunedStart)
    torch.testing.assert_close(kept_rows(cfg)[0][1:OLD], weight[1:])


def test_pretuning_lowers_its_loss(shapes_cfg: MakeConfig, base: Path) -> None:
    protocol = Protocol('3-3', num_classes=6)
    cfg = shapes_cfg('nest', image_size=48, crop_size=48, train_images=16)
    cfg = build_stage_config(cfg, protocol, protocol.stages[1], '')
    cfg.model.old_model.checkpoint = cfg.load_from = str(base)
    model = MODELS.build(cfg.model)
    told: list[str] = []
    runner = SimpleNamespace(
        cfg=cfg, seed=0, build_dataloader=Runner.build_dataloader, logger=SimpleNamespace(info=told.append)
    )
    weight, bias = old_rows(cfg)
    rows = torch.cat([weight, weight[:NEW]]), torch.cat([bias, bias[:NEW]])
    mixture = RowMixture(rows, torch.ones(NEW, OLD, weight.shape[1]), torch.ones(NEW).bool())
    pretune(runner, model, mixture, PretunedStart(epochs=4, lr=3e-3))
    first, last = (float(line.rsplit(' ', 1)[1]) for line in (told[0], told[-1]))
    assert last < 0.8 * first


@pytest.mark.parametrize('size', [(40, 64), (70, 50), (33, 100)])
def test_windows_are_those_of_mmsegs_prediction(size: tuple[int, int]) -> None:
    cfg = Config(dict(mode='slide', crop_size=(40, 48), stride=(24, 20)))._cfg_dict
    image = torch.arange(float(size[0] * size[1])).view(1, 1, *size)
    seen: list[Tensor] = []

    class Records:
        test_cfg, out_channels = cfg, 1

        def encode_decode(self, inputs: Tensor, _: Any) -> Tensor:
            seen.append(inputs)
            return inputs

    EncoderDecoder.slide_inference(Records(), image, [{}])
    found = [image[..., rows, columns] for rows, columns in windows(size, cfg)]
    assert len(found) == len(seen) > 1
    assert all(torch.equal(one, other) for one, other in zip(found, seen, strict=True))
    assert [image[..., r, c].shape for r, c in windows(size, dict(mode='whole'))] == [image.shape]


def test_the_hook_comes_with_the_starts_that_need_it() -> None:
    for start, count in {'balanced': 0, 'similar': 1, 'pretuned': 1}.items():
        assert len(hooks_of_parts(dict(classifier_init=start))) == count
        assert len(hooks_of_parts(dict(classifier_init=dict(type=start)))) == count
    NewRowsHook().before_train(SimpleNamespace(model=nn.Linear(1, 1), iter=0))  # of a user's own


@pytest.mark.slow
def test_two_processes_start_from_the_rows_of_one(shapes_root: Path, base: Path, tmp_path: Path) -> None:
    found = []
    for processes, batch_size in ((1, 4), (2, 2)):
        path = tmp_path / f'{processes}.py'
        path.write_text(
            f"_base_ = ['{ROOT}/configs/nest/segformer_tiny_shapes_3-1.py']\n"
            f"custom_imports = dict(imports=['mmseg_sats', 'tests.in_double'])\n"
            f"method = 'nest'\ndata_root = '{shapes_root}'\nbase = '{base}'\n"
            "protocol = '3-3'\nimage_size = 64\ncrop_size = 64\ntrain_images = 24\nval_images = 12\nepochs = 1\n"
            f'batch_size = {batch_size}\nreport = None\nrehearsal = None\nnum_workers = 0\n'
        )
        run_processes(path, tmp_path / f'run_{processes}', processes=processes)
        with np.load(tmp_path / f'run_{processes}/stage_1/new_rows.npz') as rows:
            found.append((rows['weight'], rows['bias']))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""``AttentionMixVisionTransformer`` against mmseg's own, and what each of its changes is worth."""

import importlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import torch
from mmseg.models.backbones import MixVisionTransformer
from mmseg.models.backbones.mit import MixFFN
from mmseg.models.utils import nchw_to_nlc, nlc_to_nchw
from prettytable import PrettyTable, TableStyle
from torch import Tensor, nn

from benchmarks.measure import PRECISIONS, Ratio, Work, device, median_seconds, peak_bytes
from benchmarks.models import SIZES
from mmseg_sats.models.backbones import AttentionMixVisionTransformer, attention_mit
from mmseg_sats.models.backbones.self_attention import GridSize

MODELS = {f'MiT-{size}': dict(SIZES[size], num_heads=[1, 2, 5, 8]) for size in ('B0', 'B2')}
CROP = 512
# With two images a GPU would be measured by how fast it is given work.
BATCH = 16 if torch.cuda.is_available() else 2
GOAL, CLOSE = 1.2, 1e-4

# The package has a function of the module's name.
_self_attention = importlib.import_module('mmseg_sats.models.backbones.self_attention')


def measure() -> list[Ratio]:
    """The ratios; prints, for MiT-B0, what each change is worth when it alone is taken back."""
    ratios: list[Ratio] = []
    for name, options in MODELS.items():
        stock, own = make_pair(options)
        images = torch.randn(BATCH, 3, CROP, CROP, device=device())
        ratios.append(difference(name, stock, own, images))
        for precision in precisions(name):
            ratios += throughput(f'{name}, {precision}', PRECISIONS[precision], stock, own, images)
        ratios += memory(name, stock, own, images)
        if name == 'MiT-B0':
            print(f'{name}, fp32, with one change taken back:\n{ablation(stock, own, images)}')
            ratios += compiled(f'{name}, fp32', own, images)
    return ratios


def make_pair(options: Mapping) -> tuple[nn.Module, nn.Module]:
    """mmseg's backbone and ours, with the same weights, in training mode."""
    torch.manual_seed(0)
    stock = MixVisionTransformer(**options)
    own = AttentionMixVisionTransformer(**options)
    own.load_state_dict(stock.state_dict(), strict=True)
    return stock.to(device()).train(), own.to(device()).train()


def precisions(name: str) -> list[str]:
    """What to measure a model in."""
    if torch.cuda.is_available():
        return list(PRECISIONS)
    # Few CPUs compute in bfloat16, and emulated it is slow: one model tells enough.
    return ['fp32', 'bf16'] if name == 'MiT-B0' else ['fp32']


def difference(name: str, stock: nn.Module, own: nn.Module, images: Tensor) -> Ratio:
    """Whether the features are mmseg's; how far they are off is rounding, which no two machines share."""
    with torch.no_grad():
        pairs = list(zip(own(images), stock(images), strict=True))
    worst = max(float((mine - theirs).abs().max()) for mine, theirs in pairs)
    largest = max(float(theirs.abs().max()) for _, theirs in pairs)
    detail = f'{worst:.1e} at most, of {largest:.2g}'
    return Ratio(f'{name}, fp32: features off by more than {CLOSE:g}', float(worst > CLOSE), 0, detail=detail)


def throughput(
    what: str, dtype: torch.dtype | None, stock: nn.Module, own: nn.Module, images: Tensor
) -> list[Ratio]:
    """Images a second of ours over those of mmseg's, in training and in inference."""
    ratios = []
    for name, work in (('training step', training_step), ('inference', inference)):
        seconds = median_seconds(
            {'stock': work(stock, images, dtype), 'own': work(own, images, dtype)}
        )
        detail = f'{seconds["own"]:.3g} s instead of {seconds["stock"]:.3g} s for {BATCH} images'
        value = seconds['stock'] / seconds['own']
        ratios.append(Ratio(f'{what}: {name}, throughput', value, GOAL, True, detail))
    return ratios


def memory(name: str, stock: nn.Module, own: nn.Module, images: Tensor) -> list[Ratio]:
    """Peak memory over mmseg's, in training and in inference."""
    ratios = []
    for what, work in (('training step', training_step), ('inference', inference)):
        ours, theirs = (peak_bytes(work(model, images)) / 2**20 for model in (own, stock))
        detail = f'{ours:.0f} MiB instead of {theirs:.0f} MiB'
        ratios.append(Ratio(f'{name}, fp32: {what}, memory', ours / theirs, 1, detail=detail))
    return ratios


def compiled(what: str, own: nn.Module, images: Tensor) -> list[Ratio]:
    """Throughput of ours under ``torch.compile`` over ours as it is; none without a C++ compiler."""
    if not shutil.which(os.environ.get('CXX', 'g++')):
        print('no C++ compiler: torch.compile is not measured')
        return []
    faster = torch.compile(own)
    ratios = []
    for name, work in (('training step', training_step), ('inference', inference)):
        works = {'as it is': work(own, images), 'compiled': work(faster, images)}
        start = time.perf_counter()
        works['compiled']()
        first = time.perf_counter() - start
        seconds = median_seconds(works)
        detail = f'{seconds["compiled"]:.3g} s instead of {seconds["as it is"]:.3g} s; {first:.0f} s the first time'
        value = seconds['as it is'] / seconds['compiled']
        ratios.append(Ratio(f'{what}, compiled: {name}, throughput', value, None, True, detail))
    return ratios


def training_step(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> Work:
    """Forward, and backward from given gradients of the features."""
    gradients: list[Tensor] = []

    def step() -> None:
        with autocast(dtype):
            features = model(images)
        if not gradients:
            gradients.extend(torch.randn_like(feature) for feature in features)
        torch.autograd.backward(features, gradients)
        model.zero_grad()

    return step


def inference(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> Work:
    """The features alone."""

    def infer() -> None:
        with torch.no_grad(), autocast(dtype):
            model(images)

    return infer


def autocast(dtype: torch.dtype | None) -> AbstractContextManager:
    """Automatic mixed precision, or float32."""
    return nullcontext() if dtype is None else torch.autocast(device().type, dtype)


def ablation(stock: nn.Module, own: nn.Module, images: Tensor) -> PrettyTable:
    """Throughput over mmseg's with all changes, and with each taken back."""
    table = PrettyTable(['', 'training step', 'inference'])
    table.set_style(TableStyle.MARKDOWN)
    table.align = 'l'
    columns = []
    for work in (training_step, inference):
        works = {'stock': work(stock, images), 'all changes': work(own, images)}
        for name, take_back in TAKEN_BACK.items():
            works[f'without {name}'] = within(partial(take_back, own), work(own, images))
        columns.append(median_seconds(works))
    for name in columns[0]:
        table.add_row([name, *(f'{seconds["stock"] / seconds[name]:.3f}' for seconds in columns)])
    return table


def within(context: Callable[[], AbstractContextManager], work: Work) -> Work:
    """``work``, each time inside a new ``context``."""

    def run() -> None:
        with context():
            work()

    return run


def dense_attention(own: nn.Module) -> AbstractContextManager:
    """Attention by its formula, the whole map kept for backward."""
    del own

    def attend(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        assert not dropout_p
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value

    return patch.object(_self_attention.F, 'scaled_dot_product_attention', attend)


def convolved_feed_forward(own: nn.Module) -> AbstractContextManager:
    """mmseg's feed-forward layer: three convolutions of an image."""
    del own

    def feed_forward(module: MixFFN, x: Tensor, hw: GridSize, *, identity: Tensor) -> Tensor:
        return module(x, hw, identity=identity)

    return patch.object(attention_mit, 'mix_ffn', feed_forward)


def convolved_reduction(own: nn.Module) -> AbstractContextManager:
    """mmseg's spatial reduction: a convolution."""
    del own

    def reduce(conv: nn.Conv2d, x: Tensor, hw: GridSize) -> tuple[Tensor, GridSize]:
        reduced = conv(nlc_to_nchw(x, hw))
        return nchw_to_nlc(reduced), tuple(reduced.shape[2:])

    return patch.object(_self_attention, 'reduce_tokens', reduce)


@contextmanager
def channels_first(own: nn.Module) -> Iterator[None]:
    """The images as they come."""
    first = own.layers[0][0].projection
    handle = first.register_forward_pre_hook(lambda _, args: args[0].contiguous())
    yield
    handle.remove()


TAKEN_BACK = {
    'scaled_dot_product_attention': dense_attention,
    'the feed-forward layer on tokens': convolved_feed_forward,
    'the spatial reduction as a product': convolved_reduction,
    'channels-last images': channels_first,
}

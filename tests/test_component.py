# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""mmseg_sats.functional with torch alone, and docs/component.md. Nothing here needs more than torch and pytest."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmseg_sats.functional as package
from mmseg_sats.functional import (
    attend_with_map,
    count_entropies,
    entropy_labels,
    entropy_thresholds,
    fill_background,
    map_of_qkv,
    no_entropies,
    sigmoid_labels,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs/component.md'
# What may not be imported by functional, nor by anything that it imports.
ABSENT = (
    'mmengine', 'mmcv', 'mmseg', 'cv2', 'scipy', 'matplotlib', 'rich', 'PIL', 'yapf', 'jinja2', 'prettytable',
)  # fmt: skip
BLOCKED = f"""
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.split('.')[0] in {ABSENT}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
"""
# What the page's readers bring: models (timm's names, timm itself is not needed) and a loader.
BEFORE = """
import torch
from torch import nn

torch.manual_seed(0)

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))

class Block(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), Attention(dim, num_heads)

    def forward(self, x):
        return x + self.attn(self.norm(x))

class PatchEmbed(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.patch_size, self.proj = (patch, patch), nn.Conv2d(3, dim, patch, patch)

class VisionTransformer(nn.Module):
    def __init__(self, dim=16, num_heads=2, depth=3, patch=4):
        super().__init__()
        self.embed_dim, self.num_prefix_tokens = dim, 1
        self.patch_embed, self.cls_token = PatchEmbed(dim, patch), nn.Parameter(torch.randn(1, 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, num_heads) for _ in range(depth)))

    def forward_features(self, images):
        x = self.patch_embed.proj(images).flatten(2).mT
        return self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))

NUM_OLD = 4
SQUARES = torch.arange(NUM_OLD + 2).repeat_interleave(4).view(1, 1, 1, 24).expand(2, 1, 24, 24)
IMAGES = torch.cat([SQUARES / 3, SQUARES % 2, (SQUARES > 2).float()], 1) + 0.1 * torch.randn(2, 3, 24, 24)
OLD_LABELS, LABELS = (torch.where(kept, SQUARES, 0)[:, 0] for kept in (SQUARES < NUM_OLD, SQUARES >= NUM_OLD))
"""
AFTER = """
class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, NUM_OLD, 1)
        self.layers = nn.ModuleList(
            Layer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2))

    def forward(self, images):
        x, maps = self.embed(images), []
        hw, x = x.shape[2:], x.flatten(2).mT
        for layer in self.layers:
            x, attention = layer(x, hw)
            maps.append(attention)
        return self.head(x.mT.unflatten(2, hw)), maps

def train_old(model):
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        logits = F.interpolate(model(IMAGES)[0], 24, mode='bilinear')
        optimizer.zero_grad()
        F.cross_entropy(logits, OLD_LABELS).backward()
        optimizer.step()
    return model

for old in (train_old(Segmenter(VisionTransformer(), NUM_OLD, layers=(0, -1))), train_old(Plain())):
    kept = copy.deepcopy(old.state_dict())
    distances = []
    for lambda_a in (0.0, 20.0):
        new = grown(old, 2)
        logits, old_logits = new(IMAGES)[0], old(IMAGES)[0]
        assert torch.allclose(unbiased_distillation(logits, old_logits),
                              unbiased_distillation(old_logits, old_logits), atol=1e-6)  # background shared
        learn(old, new, [(IMAGES, LABELS)] * 20, NUM_OLD, lambda_a=lambda_a)
        (logits, maps), (_, old_maps) = new(IMAGES), old(IMAGES)
        assert logits.shape[1] == NUM_OLD + 2 and len(maps) == 2
        distances.append(float(crp_loss(maps, old_maps, LABELS + OLD_LABELS)))
        right = F.interpolate(logits, 24, mode='nearest').argmax(1) == LABELS
        assert right[LABELS > 0].float().mean() > 0.8  # it learns the new classes
    assert all(torch.equal(old.state_dict()[name], kept[name]) for name in kept)
    assert distances[1] < 0.7 * distances[0], distances
    print('ok')
"""


def python_blocks(page: Path) -> str:
    return '\n'.join(re.findall(r'^```python\n(.*?)^```', page.read_text(encoding='utf-8'), re.M | re.S))


def run(text: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', text], env=env, text=True, capture_output=True,
                          check=False)


def test_the_page_runs_where_nothing_but_torch_can_be_imported() -> None:
    """And what it says of the loss holds: the new model attends more as the old one does."""
    done = run(BLOCKED + BEFORE + python_blocks(PAGE) + AFTER)
    assert done.stdout.split() == ['ok', 'ok'], done.stderr[-3000:]


def test_the_page_is_one_that_people_read() -> None:
    assert len(PAGE.read_text(encoding='utf-8').splitlines()) <= 60


def test_every_file_of_functional_is_imported_with_torch_alone() -> None:
    """But for the GPU's kernels, which are imported where Triton is."""
    files = sorted((ROOT / 'mmseg_sats/functional').rglob('*.py'))
    names = ['.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in files]
    assert len(names) > 15
    text = 'import importlib\n' + '\n'.join(
        f'importlib.import_module({name!r})' for name in names if not name.endswith('triton_pooling')
    )
    done = run(BLOCKED + text)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_name_is_there() -> None:
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert hasattr(package, name)
    assert package.Protocol('15-1', 20).stages[1].new == (16,)


@pytest.mark.slow
def test_these_tests_pass_in_an_environment_of_torch_and_pytest(tmp_path: Path) -> None:
    """MMSEG_SATS_TORCH_ONLY names its Python; without it one is made, which needs pip's index."""
    python = os.environ.get('MMSEG_SATS_TORCH_ONLY')
    if python is None:
        venv.create(tmp_path / 'venv', with_pip=True)
        python = str(tmp_path / 'venv/bin/python')
        subprocess.run([python, '-m', 'pip', 'install', '--quiet', 'torch', 'pytest'], check=True)
    words = ['-m', 'pytest', '--noconftest', '-p', 'no:cacheprovider', '-m', 'not slow', 'tests/test_component.py']
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    absent = [python, '-c', 'import mmengine']
    assert subprocess.run(absent, cwd=tmp_path, capture_output=True, check=False).returncode != 0
    done = subprocess.run([python, *words], cwd=ROOT, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# --- maps of layers that are not ours ---


def softmax_of(query: Tensor, key: Tensor) -> Tensor:
    scores = torch.einsum('bhld,bhsd->bhls', query, key) / query.shape[-1] ** 0.5
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


def test_the_map_of_a_packed_projection() -> None:
    """As timm computes it: by kind, then head, then dimension; the class token is a key and has no row."""
    qkv = torch.randn(2, 1 + 6, 3 * 8, dtype=torch.float64)
    query, key = (
        torch.stack([qkv[..., start + 4 * head : start + 4 * head + 4] for head in range(2)], 1) for start in (0, 8)
    )
    attention = map_of_qkv(qkv, 2, (2, 3), extra_tokens=1)
    assert attention.shape == (2, 2, 6, 7)
    torch.testing.assert_close(attention.dense(), softmax_of(query, key)[:, :, 1:])


def test_a_packed_projection_and_multihead_attention_have_one_map() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    out, attention = attend_with_map(module, x, (2, 3))
    expected, dense = module(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(attention.dense(), dense)
    packed = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    torch.testing.assert_close(map_of_qkv(packed, 2, (2, 3)).dense(), dense)


@pytest.mark.parametrize(
    ('shape', 'heads', 'hw', 'message'),
    [
        ((2, 6, 25), 2, (2, 3), r'qkv must be \(B, N, 3 \* C\) with C a multiple of num_heads=2, got \(2, 6, 25\)'),
        ((2, 6, 24), 3, (2, 3), 'num_heads=3'),
        ((6, 24), 2, (2, 3), r'got \(6, 24\)'),
        ((2, 6, 24), 2, (2, 2), r'query_hw \(2, 2\) does not hold 6 positions'),
    ],
)
def test_a_packed_projection_that_does_not_fit(
    shape: tuple[int, ...], heads: int, hw: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        map_of_qkv(torch.zeros(shape), heads, hw)


# --- pseudo-labels; more of them in the tests of the registered labelers ---


def test_thresholds_are_found_in_a_pass() -> None:
    """Half of the background pixels of a class are under its median, and keep the old model's class."""
    labels = torch.zeros(3, 20, 20, dtype=torch.long)
    labels[:, 0] = 5
    logits = 3 * torch.randn(3, 4, 20, 20, generator=torch.Generator().manual_seed(1))
    counts = no_entropies(4)
    for image in range(3):
        count_entropies(counts, labels[image : image + 1], logits[image : image + 1])
    assert counts.sum() == 3 * 19 * 20
    completed = entropy_labels(labels, logits, entropy_thresholds(counts))
    assert (completed[:, 0] == 5).all()
    predicted = logits.argmax(1)[:, 1:]
    for c in range(4):
        own = completed[:, 1:][predicted == c]
        assert set(own.tolist()) == {c, 255}
        assert abs((own == c).float().mean() - 0.5) < 0.02


def test_labels_by_sigmoid_and_by_opinion() -> None:
    labels = torch.tensor([[[0, 0, 0, 2]]])
    logits = torch.tensor([[0.0, 0.0, 9.0, 0.0], [3.0, 0.1, 1.0, 9.0]]).view(1, 2, 1, 4)
    assert sigmoid_labels(labels, logits, 0.7).tolist() == [[[1, 0, 0, 2]]]
    assert fill_background(labels, logits.argmax(1)).tolist() == [[[1, 1, 0, 2]]]

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The converter of original MiT checkpoints, against a model that has the original's names and
arithmetic."""

from pathlib import Path

import pytest
import torch
from mmseg.models.backbones import MixVisionTransformer
from torch import Tensor, nn

from mmseg_sats.models.backbones import original_mit as convert_mit
from mmseg_sats.models.backbones.attention_mit import AttentionMixVisionTransformer
from tools.convert_mit import main

DIMS, HEADS, DEPTHS, RATIOS = (8, 16, 24, 32), (1, 2, 3, 4), (2, 1, 1, 2), (4, 2, 2, 1)
CONFIG = {'embed_dims': 8, 'num_layers': DEPTHS, 'num_heads': HEADS, 'sr_ratios': RATIOS}


class _Embed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride, patch // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        height, width = x.shape[2:]
        return self.norm(x.flatten(2).transpose(1, 2)), height, width


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.ratio = heads, ratio
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        if ratio > 1:
            self.sr = nn.Conv2d(dim, dim, ratio, ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        batch, length, dim = x.shape
        size = dim // self.heads
        query = self.q(x).reshape(batch, length, self.heads, size).permute(0, 2, 1, 3)
        if self.ratio > 1:
            x = self.sr(x.transpose(1, 2).reshape(batch, dim, height, width))
            x = self.norm(x.reshape(batch, dim, -1).transpose(1, 2))
        both = self.kv(x).reshape(batch, -1, 2, self.heads, size).permute(2, 0, 3, 1, 4)
        weights = (query @ both[0].transpose(2, 3) / size**0.5).softmax(-1)
        return self.proj((weights @ both[1]).transpose(1, 2).reshape(batch, length, dim))


class _DepthWise(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        grid = x.transpose(1, 2).reshape(len(x), -1, height, width)
        return self.dwconv(grid).flatten(2).transpose(1, 2)


class _Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.dwconv = _DepthWise(4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.fc2(nn.functional.gelu(self.dwconv(self.fc1(x), height, width)))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int, bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, heads, ratio, bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _Mlp(dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.attn(self.norm1(x), height, width)
        return x + self.mlp(self.norm2(x), height, width)


class _OriginalMiT(nn.Module):
    """A small encoder with the parameter names of the original."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        channels = (3, *DIMS)
        for stage in range(4):
            patch, stride = (7, 4) if stage == 0 else (3, 2)
            embed = _Embed(channels[stage], DIMS[stage], patch, stride)
            blocks = [
                _Block(DIMS[stage], HEADS[stage], RATIOS[stage], bias) for _ in range(DEPTHS[stage])
            ]
            setattr(self, f'patch_embed{stage + 1}', embed)
            setattr(self, f'block{stage + 1}', nn.ModuleList(blocks))
            setattr(self, f'norm{stage + 1}', nn.LayerNorm(DIMS[stage], eps=1e-6))
        self.head = nn.Linear(DIMS[-1], 5)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in range(1, 5):
            x, height, width = getattr(self, f'patch_embed{stage}')(x)
            for block in getattr(self, f'block{stage}'):
                x = block(x, height, width)
            x = getattr(self, f'norm{stage}')(x)
            x = x.transpose(1, 2).reshape(len(x), -1, height, width)
            features.append(x)
        return features


def make_original(bias: bool = True) -> _OriginalMiT:
    torch.manual_seed(0)
    model = _OriginalMiT(bias).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize('backbone', [MixVisionTransformer, AttentionMixVisionTransformer])
@pytest.mark.parametrize('bias', [True, False])
def test_converted_model_computes_the_same(backbone: type[nn.Module], bias: bool) -> None:
    original = make_original(bias)
    converted = backbone(**CONFIG).eval()
    converted.load_state_dict(convert_mit.convert(original.state_dict()), strict=True)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for got, expected in zip(converted(x), original(x), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_unknown_keys_are_named() -> None:
    state = make_original().state_dict() | {'decode_head.a': torch.zeros(1), 'block1.0.x': 0}
    with pytest.raises(KeyError, match=r'decode_head\.a, block1\.0\.x'):
        convert_mit.convert(state)


def test_half_a_projection_is_refused() -> None:
    state = make_original().state_dict()
    del state['block2.0.attn.kv.weight']
    with pytest.raises(KeyError, match=r'missing for layers\.1\.1\.0\.attn\.attn\.in_proj_weight'):
        convert_mit.convert(state)


@pytest.mark.parametrize('wrapped', [True, False])
def test_command_line(tmp_path: Path, wrapped: bool) -> None:
    state = make_original().state_dict()
    torch.save({'state_dict': state} if wrapped else state, tmp_path / 'source.pth')
    main([str(tmp_path / 'source.pth'), str(tmp_path / 'new' / 'mit.pth')])
    written = torch.load(tmp_path / 'new' / 'mit.pth', weights_only=True)
    MixVisionTransformer(**CONFIG).load_state_dict(written['state_dict'], strict=True)
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['mit.pth']


def test_command_line_errors_name_the_file(tmp_path: Path) -> None:
    source, target = tmp_path / 'source.pth', tmp_path / 'mit.pth'
    with pytest.raises(SystemExit, match=f'checkpoint {source} does not exist'):
        main([str(source), str(target)])
    torch.save({'block1.0.attn.w': torch.zeros(1)}, source)
    with pytest.raises(SystemExit, match=rf'{source}: .* MiT: block1\.0\.attn\.w'):
        main([str(source), str(target)])
    assert not target.exists()


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    path = tmp_path / 'source.pth'
    with pytest.raises(FileNotFoundError, match=r'source\.pth'):
        convert_mit.load(path)
    path.write_text('not a checkpoint')
    with pytest.raises(ValueError, match=r'source\.pth is not a checkpoint'):
        convert_mit.load(path)
    torch.save({'state_dict': [1, 2]}, path)
    with pytest.raises(ValueError, match=r'source\.pth holds a list, expected a dict of tensors'):
        convert_mit.load(path)
    torch.save({'state_dict': {'epoch': 3}}, path)
    with pytest.raises(ValueError, match=r'source\.pth must hold a dict of tensors'):
        convert_mit.load(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({'state_dict': _Arbitrary()}, tmp_path / 'source.pth')
    with pytest.raises(ValueError, match='not a checkpoint that can be read safely'):
        convert_mit.load(tmp_path / 'source.pth')


class _Arbitrary:
    """Any class: unpickling one runs code of the file's choice."""


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / 'mit.pth'
    target.write_text('old')

    def fail(*_: object) -> None:
        raise OSError('disk full')

    monkeypatch.setattr(convert_mit.torch, 'save', fail)
    with pytest.raises(OSError, match='disk full'):
        convert_mit.save({}, target)
    assert target.read_text() == 'old'
    assert [path.name for path in tmp_path.iterdir()] == ['mit.pth']


def test_a_file_with_mmseg_names_needs_no_conversion(tmp_path: Path) -> None:
    torch.save({'layers.0.0.projection.weight': torch.zeros(1)}, tmp_path / 'mit.pth')
    with pytest.raises(SystemExit, match=r"mit\.pth: the names are mmseg's already: use the file as it is"):
        main([str(tmp_path / 'mit.pth'), str(tmp_path / 'out.pth')])
    assert not (tmp_path / 'out.pth').exists()


def test_of_many_foreign_names_some_are_shown() -> None:
    with pytest.raises(KeyError, match=r'x0, x1, x2, x3, x4 and 3 more'):
        convert_mit.convert({f'x{i}': torch.zeros(1) for i in range(8)})


def test_a_file_without_an_encoder_is_refused(tmp_path: Path) -> None:
    torch.save({'head.weight': torch.zeros(2)}, tmp_path / 'source.pth')
    with pytest.raises(SystemExit, match='no parameter of an original MiT encoder'):
        main([str(tmp_path / 'source.pth'), str(tmp_path / 'mit.pth')])
    assert not (tmp_path / 'mit.pth').exists()

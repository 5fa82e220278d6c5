# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A stage's model outside this package: in stock mmseg, where the package cannot be imported, and as ONNX."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.apis import inference_model
from mmseg.registry import MODELS
from torch import nn

from mmseg_sats.engine.export import onnx as onnx_export
from mmseg_sats.engine.export.stock import (
    check_same_logits,
    export_stage,
    load_for_export,
    stock_config,
)
from tests.foreign import code_blocks
from tests.in_process import call
from tests.stage_folder import CLASSES, PALETTE, make_stage

IN_STOCK_MMSEG = """
import sys
sys.modules['mmseg_sats'] = None  # any import of it fails
import numpy as np, torch
from mmseg.apis import inference_model, init_model
model = init_model('config.py', 'model.pth', device='cpu')
assert type(model).__module__.startswith('mmseg.'), type(model)
with torch.no_grad():
    logits = model(torch.from_numpy(np.load('images.npy')), mode='tensor')
result = inference_model(model, np.load('photo.npy'))
assert result.pred_sem_seg.data.shape[-2:] == (50, 70)
np.savez('found.npz', logits=logits.numpy(), classes=np.array(model.dataset_meta['classes']))
try:
    import mmseg_sats
except ImportError:
    print('without mmseg_sats')
"""


@pytest.fixture(scope='module')
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stage(tmp_path_factory.mktemp('export'))


def test_stock_mmseg_gives_the_same_logits_where_the_package_cannot_be_imported(
    stage: Path, tmp_path: Path
) -> None:
    done = call('tools/export.py', str(stage), '--out', str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'stock mmseg computes the same' in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        'config.py', 'model.pth', 'model.pth.sha256',
    }  # fmt: skip
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    np.save(tmp_path / 'images.npy', images.numpy())
    np.save(tmp_path / 'photo.npy', np.full((50, 70, 3), 90, np.uint8))
    elsewhere = subprocess.run(
        [sys.executable, '-c', IN_STOCK_MMSEG], cwd=tmp_path, env={}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert elsewhere.returncode == 0, elsewhere.stderr[-3000:]
    assert elsewhere.stdout.strip().endswith('without mmseg_sats')
    with torch.no_grad():
        expected = load_for_export(stage)[1](images, mode='tensor').numpy()
    found = np.load(tmp_path / 'found.npz')
    assert 0.1 < np.ptp(expected) < 20
    np.testing.assert_allclose(found['logits'], expected, rtol=0, atol=1e-5)
    assert found['classes'].tolist() == CLASSES


def test_nothing_of_the_package_is_left_in_the_config(stage: Path, tmp_path: Path) -> None:
    config, checkpoint = export_stage(stage, tmp_path)
    text = config.read_text()
    assert 'mmseg_sats' not in text
    assert str(stage) not in text
    model = Config.fromfile(config).model
    assert (model.type, model.backbone.type) == ('EncoderDecoder', 'MixVisionTransformer')
    assert model.decode_head.loss_decode.type == 'CrossEntropyLoss'
    assert 'attention_layers' not in model.backbone
    assert torch.load(checkpoint, weights_only=True)['meta']['dataset_meta']['palette'] == PALETTE


@MODELS.register_module()
class HeadOfItsOwn(nn.Module):
    """A part that no mmseg has; its module's name is set to the package's."""


def test_a_part_that_mmseg_lacks_is_named(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeadOfItsOwn, '__module__', 'mmseg_sats.models.somewhere')
    cfg = load_for_export(stage)[0]
    cfg.model.decode_head.type = 'HeadOfItsOwn'
    with pytest.raises(ValueError, match='HeadOfItsOwn extends no part of mmseg'):
        stock_config(cfg, {})


def test_a_model_that_computes_something_else_is_refused(stage: Path) -> None:
    cfg, model = load_for_export(stage)
    stock = stock_config(cfg, {}).model
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    check_same_logits(model, stock, weights)
    weights['decode_head.conv_seg.bias'] += 1
    with pytest.raises(ValueError, match='gives other logits from the same weights'):
        check_same_logits(model, stock, weights)
    del weights['decode_head.conv_seg.bias']
    with pytest.raises(ValueError, match=r"differ by \['decode_head.conv_seg.bias'\]"):
        check_same_logits(model, stock, weights)


def test_a_folder_that_is_no_stage_is_named(tmp_path: Path) -> None:
    done = call('tools/export.py', str(tmp_path))
    assert done.returncode == 1
    assert f'{tmp_path}/config.py does not exist: expected the folder of a finished' in done.stderr


# --- ONNX ---


@pytest.fixture
def needs_onnx() -> None:
    missing = [name for name in onnx_export.NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f'not installed: {", ".join(missing)} (requirements/onnx.txt)')


def test_onnxruntime_gives_the_same_logits_at_other_sizes(
    stage: Path, tmp_path: Path, needs_onnx: None
) -> None:
    import onnxruntime

    done = call('tools/export.py', str(stage), '--out', str(tmp_path), '--onnx')
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'onnxruntime differs from PyTorch by' in done.stdout
    session = onnxruntime.InferenceSession(
        str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider']
    )
    model = onnx_export.WholeImageLogits(load_for_export(stage)[1])
    # Neither is a size that the tool itself looks at; odd ones and several images among them.
    for shape in ((1, 3, 97, 131), (3, 3, 64, 160)):
        images = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
        (found,) = session.run(None, {'images': images.numpy()})
        with torch.no_grad():
            expected = model(images).numpy()
        assert found.shape == (shape[0], len(CLASSES), *shape[2:])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata['classes']) == CLASSES
    assert json.loads(metadata['mean']) == pytest.approx([123.675, 116.28, 103.53])
    follow_the_page(stage, tmp_path)


def follow_the_page(stage: Path, folder: Path) -> None:
    """docs/serving.md's own lines see the same classes in a photograph as mmseg does."""
    photo = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / 'photo.jpg'), photo)
    (folder / 'exported').mkdir()
    (folder / 'model.onnx').rename(folder / 'exported/model.onnx')
    lines = code_blocks(Path(__file__).parents[1] / 'docs/serving.md', 'python')[1]
    found: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(lines, found)
        expected = inference_model(load_for_export(stage)[1], 'photo.jpg').pred_sem_seg.data[0].numpy()
    assert (found['labels'] == expected).mean() > 0.999  # ties may fall either way


def test_onnx_that_differs_is_not_written(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_onnx: None
) -> None:
    monkeypatch.setattr(onnx_export, '_serialised', lambda *_, **__: b'')
    monkeypatch.setattr(onnx_export, '_difference', lambda *_: 2e-4)
    with pytest.raises(ValueError, match=r'differ by 0\.0002 from PyTorch'):
        onnx_export.export_onnx(load_for_export(stage)[1], tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, 'NEEDED', ('torch', 'package_that_is_not_there'))
    with pytest.raises(ImportError, match=r'needs package_that_is_not_there: `pip install .*onnx'):
        onnx_export.check_onnx_installed()

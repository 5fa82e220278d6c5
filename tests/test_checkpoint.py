# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Files that a later stage depends on: whole or absent, read without running code, fitting or refused."""

import io
import json
import os
import pickle
import re
import struct
import tarfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from torch import Tensor, nn

from mmseg_sats.engine.files.base import adopt_base
from mmseg_sats.engine.files.snapshot import load_snapshot, trained_weights, write_weights
from mmseg_sats.utils.checkpoint import (
    load_checkpoint_safely,
    write_atomically,
    write_json,
    write_text,
)
from tests.small_models import auxiliary_head_cfg, build, images, model_cfg

CLASSES = ['background', 'circle', 'square', 'star']
META = dict(classes=CLASSES, palette=[[0, 0, 0]] * 4)


# Writing


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / 'results.json'
    path.write_text('old')

    def write(file: IO[bytes]) -> None:
        file.write(b'half of the ne')
        raise RuntimeError('disk full')

    with pytest.raises(RuntimeError, match='disk full'):
        write_atomically(path, write)
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['results.json']


def test_a_failing_writer_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_atomically(tmp_path / 'new', lambda file: file.write('text, not bytes'))
    assert os.listdir(tmp_path) == []


def test_the_file_is_complete_before_it_takes_its_name(tmp_path: Path) -> None:
    path = tmp_path / 'file'
    path.write_text('old')
    seen = []

    def write(file: IO[bytes]) -> None:
        file.write(b'new')
        file.flush()
        seen.append(path.read_text())

    write_atomically(path, write)
    assert seen == ['old']
    assert path.read_text() == 'new'
    assert os.listdir(tmp_path) == ['file']


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='nowhere'):
        write_text(tmp_path / 'nowhere' / 'file', 'x')


def test_text_and_json(tmp_path: Path) -> None:
    write_text(tmp_path / 'text', 'grün\n')
    assert (tmp_path / 'text').read_bytes() == 'grün\n'.encode()
    write_json(tmp_path / 'json', dict(a=[1, None], b=0.1))
    assert json.loads((tmp_path / 'json').read_text()) == dict(a=[1, None], b=0.1)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_json_refuses_what_is_no_json(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / 'json', dict(a=1))
    with pytest.raises(ValueError, match='JSON'):
        write_json(tmp_path / 'json', dict(a=value))
    assert json.loads((tmp_path / 'json').read_text()) == dict(a=1)


# Reading: code is never run


class RunsCode:
    """Unpickled by anything but a safe reader, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.marker),)


def global_(module: str, name: str) -> bytes:
    return f'c{module}\n{name}\n'.encode()


def text(value: str) -> bytes:
    return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def attribute(owner: bytes, name: str) -> bytes:
    """Pickle opcodes for ``getattr(owner, name)``."""
    return global_('builtins', 'getattr') + owner + text(name) + b'\x86R'


def pickle_by_attributes(code: str) -> bytes:
    """A pickle that names nothing but ``getattr`` and mmengine's HistoryBuffer, and evaluates ``code``.

    It puts an object of its own in the place of numpy in the module of HistoryBuffer, whose constructor
    then calls whatever that object's ``array`` is: first the look-up of a builtin, then that builtin.
    """
    buffer = global_('mmengine.logging.history_buffer', 'HistoryBuffer')
    init = attribute(buffer, '__init__')
    look_up = attribute(attribute(init, '__builtins__'), '__getitem__')
    stand_in = buffer + b')Rq\x00}' + text('array') + look_up + b'sb'
    replace = attribute(init, '__globals__') + text('np') + b'h\x00s'
    builtin = buffer + text('eval') + text('exec') + b'\x86Rq\x01'
    arm = b'h\x00}' + text('array') + attribute(b'h\x01', '_log_history') + b'sb'
    fire = buffer + text(code) + text(code) + b'\x86R'
    return b'\x80\x02' + stand_in + replace + builtin + arm + fire + b'.'


@pytest.mark.parametrize('zipped', [True, False])
def test_a_checkpoint_that_carries_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / 'evil.pth', tmp_path / 'marker'
    checkpoint = dict(state_dict=dict(a=torch.zeros(2)), meta=RunsCode(marker))
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf'{path}.*carries code'):
        load_checkpoint_safely(path)
    assert not marker.exists()
    # The trap does work on a reader that is not careful.
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_bare_pickle_that_carries_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / 'evil.pkl', tmp_path / 'marker'
    path.write_bytes(pickle.dumps(dict(state_dict=RunsCode(marker)), protocol=2))
    with pytest.raises(ValueError, match='carries code'):
        load_checkpoint_safely(path)
    assert not marker.exists()


def test_code_put_together_from_attributes_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mmengine.logging.history_buffer as module

    # Where the attack succeeds, the module is restored afterwards.
    monkeypatch.setattr(module, 'np', module.np)
    path, marker = tmp_path / 'evil.pth', tmp_path / 'marker'
    path.write_bytes(pickle_by_attributes(f'[__import__("os").mkdir({str(marker)!r}), []][1]'))
    with pytest.raises(ValueError, match=str(path)):
        load_checkpoint_safely(path)
    assert not marker.exists()
    assert module.np.array([1]).tolist() == [1]


def test_a_checkpoint_of_mmengine_is_read(tmp_path: Path) -> None:
    """Beside the weights, an epoch's checkpoint holds the history of what was logged."""
    hub = MessageHub('test_checkpoint')
    hub.update_scalar('train/loss', 0.5)
    hub.update_info('epoch', 1)
    path = tmp_path / 'epoch_1.pth'
    checkpoint = dict(
        state_dict=dict(a=torch.arange(3)), message_hub=hub.state_dict(), optimizer=dict(state={}),
        meta=dict(epoch=1, seed=0, dataset_meta=dict(classes=('a', 'b'))),
    )
    torch.save(checkpoint, path)
    methods = dict(HistoryBuffer._statistics_methods)
    loaded = load_checkpoint_safely(path)
    assert loaded['state_dict']['a'].tolist() == [0, 1, 2]
    assert loaded['meta']['dataset_meta']['classes'] == ('a', 'b')
    assert HistoryBuffer._statistics_methods == methods
    assert hub.get_scalar('train/loss').statistics('mean') == 0.5


@pytest.mark.parametrize('core', ['numpy.core', 'numpy._core'])
def test_arrays_are_read_whichever_numpy_wrote_them(tmp_path: Path, core: str) -> None:
    path = tmp_path / 'epoch_1.pth'
    numbers = dict(array=np.arange(3.0), number=np.float64(0.5))
    torch.save(dict(state_dict={}, meta=numbers), path, _use_new_zipfile_serialization=False)
    own = np.zeros(0).__reduce__()[0].__module__.removesuffix('.multiarray')
    content = path.read_bytes()
    assert own.encode() in content
    path.write_bytes(content.replace(f'c{own}.'.encode(), f'c{core}.'.encode()))
    meta = load_checkpoint_safely(path)['meta']
    assert meta['array'].tolist() == [0, 1, 2]
    assert meta['number'] == 0.5


def test_what_others_allow_is_not_allowed_here_and_stays_theirs(tmp_path: Path) -> None:
    before = list(torch.serialization.get_safe_globals())
    torch.save(dict(state_dict={}, meta=Namespace()), tmp_path / 'other.pth')
    torch.serialization.add_safe_globals([Namespace])
    try:
        with pytest.raises(ValueError, match='carries code'):
            load_checkpoint_safely(tmp_path / 'other.pth')
        assert Namespace in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_a_torchscript_archive_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.jit.save(torch.jit.script(nn.Identity()), tmp_path / 'script.pth')
    monkeypatch.setattr(torch.jit, 'load', lambda *_, **__: pytest.fail('it was run'))
    with pytest.raises(ValueError, match='TorchScript'):
        load_checkpoint_safely(tmp_path / 'script.pth')


def test_a_tar_file_is_refused_and_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / 'old.pth', 'w') as tar:
        for name in ('storages', 'tensors', 'pickle'):
            tar.addfile(tarfile.TarInfo(name))
    monkeypatch.setattr(tarfile.TarFile, 'extract', lambda *_, **__: pytest.fail('it was unpacked'))
    with pytest.raises(ValueError, match='tar'):
        load_checkpoint_safely(tmp_path / 'old.pth')


# Reading: files that are no checkpoints


def save_bytes(**options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(dict(meta=dict(epoch=3), state_dict=dict(a=torch.ones(5, 7))), file, **options)
    return file.getvalue()


@pytest.mark.parametrize('zipped', [True, False])
def test_a_checkpoint_cut_off_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    whole = save_bytes(_use_new_zipfile_serialization=zipped)
    path = tmp_path / 'cut.pth'
    path.write_bytes(whole)
    assert load_checkpoint_safely(path)['state_dict']['a'].sum() == 35
    for length in range(0, len(whole), 11):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r'cut\.pth is not a checkpoint that can be read safely'):
            load_checkpoint_safely(path)


FOREIGN = {
    'text': b'hello world\n',
    'image': b'\x89PNG\r\n\x1a\n' + bytes(50),
    'config': b'# comment\nmodel = dict()\n',
    'json': b'{"a": 1}',
    'page': b'<html><body>not found</body></html>',
    'lfs pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12\n',
    'zip': b'PK\x03\x04' + bytes(100),
    'zeros': bytes(1000),
}


@pytest.mark.parametrize('kind', FOREIGN)
def test_a_foreign_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / 'foreign.pth'
    path.write_bytes(FOREIGN[kind])
    with pytest.raises(ValueError, match=r'foreign\.pth is not a checkpoint that can be read safely'):
        load_checkpoint_safely(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / 'none.pth', tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            load_checkpoint_safely(path)


def test_a_tensor_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(torch.zeros(2), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='holds a Tensor, expected a dict of tensors'):
        load_checkpoint_safely(tmp_path / 'a.pth')


def test_a_bare_state_dict_is_accepted(tmp_path: Path) -> None:
    weights = torch.nn.Linear(3, 2).state_dict()
    torch.save(weights, tmp_path / 'bare.pth')
    loaded = load_checkpoint_safely(tmp_path / 'bare.pth')
    assert set(loaded) == {'state_dict', 'meta'}
    assert loaded['meta'] == {}
    assert all(torch.equal(loaded['state_dict'][key], weights[key]) for key in weights)


# Snapshots


def fake_runner(model: torch.nn.Module, average: dict[str, Tensor] | None = None) -> Any:
    """A runner as ``trained_weights`` sees it; a hook puts ``average`` in the place of the weights."""

    def call_hook(name: str, checkpoint: dict) -> None:
        assert name == 'before_save_checkpoint'
        if average is not None:
            checkpoint['state_dict'] = average

    dataset = SimpleNamespace(metainfo=META)
    loader = SimpleNamespace(dataset=dataset)
    return SimpleNamespace(model=model, seed=5, call_hook=call_hook, train_dataloader=loader)


def test_a_snapshot_comes_back_bitwise(tmp_path: Path) -> None:
    model, other = build(model_cfg(4)), build(model_cfg(4), seed=1)
    write_weights(tmp_path / 'snapshot.pth', **trained_weights(fake_runner(model)))
    load_snapshot(other, tmp_path / 'snapshot.pth')
    own = other.state_dict()
    assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())
    loaded = load_checkpoint_safely(tmp_path / 'snapshot.pth')
    assert loaded['meta'] == dict(dataset_meta=META, seed=5)
    assert sorted(os.listdir(tmp_path)) == ['snapshot.pth', 'snapshot.pth.sha256']


def test_a_snapshot_holds_what_a_hook_put_in_the_place_of_the_weights(tmp_path: Path) -> None:
    model, average = build(model_cfg(4)), build(model_cfg(4), seed=1).state_dict()
    write_weights(tmp_path / 'snapshot.pth', **trained_weights(fake_runner(model, average)))
    loaded = load_checkpoint_safely(tmp_path / 'snapshot.pth')['state_dict']
    assert all(torch.equal(loaded[key], average[key]) for key in average)


def break_snapshot(weights: dict[str, Tensor], how: str) -> None:
    key = 'decode_head.conv_seg.bias'
    if how == 'missing':
        del weights[key]
    elif how == 'shape':
        weights[key] = torch.zeros(9)
    else:
        weights['decode_head.extra'] = torch.zeros(1)


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('missing', r'decode_head\.conv_seg\.bias: missing'),
        ('shape', r'decode_head\.conv_seg\.bias: \(9,\) in the checkpoint, \(4,\) in the model'),
        ('extra', r'decode_head\.extra: not in the model'),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused(tmp_path: Path, how: str, message: str) -> None:
    model = build(model_cfg(4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = build(model_cfg(4), seed=1).state_dict()
    break_snapshot(weights, how)
    path = tmp_path / 'snapshot.pth'
    write_weights(path, weights, {})
    with pytest.raises(ValueError, match=rf'{path} does not fit the model of this stage: {message}'):
        load_snapshot(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_snapshot_of_the_previous_stage_does_not_grow_on_strict_loading(tmp_path: Path) -> None:
    """Evaluating a stage with another stage's snapshot must not pass silently."""
    write_weights(tmp_path / 'snapshot.pth', build(model_cfg(4)).state_dict(), {})
    later = build(model_cfg(6, old_model=dict(checkpoint='never read', num_old=4)))
    with pytest.raises(ValueError, match=r'conv_seg\.weight: \(4, 8, 1, 1\)'):
        load_snapshot(later, tmp_path / 'snapshot.pth')


# Stage 0 from a checkpoint


def save_base(path: Path, num_classes: int, classes: list[str] | None, **options: Any) -> dict[str, Tensor]:
    weights = build(model_cfg(num_classes, **options), seed=3).state_dict()
    meta = {} if classes is None else dict(dataset_meta=dict(classes=classes, palette=[]))
    write_weights(path, weights, meta)
    return weights


@pytest.mark.parametrize('classes', [CLASSES, tuple(CLASSES), None])
def test_the_base_of_another_run_is_taken_as_it_is(tmp_path: Path, classes: Any) -> None:
    weights = save_base(tmp_path / 'base.pth', 4, classes)
    model = build(model_cfg(4))
    adopted = adopt_base(model, tmp_path / 'base.pth', CLASSES)
    assert list(adopted) == list(model.state_dict())
    assert all(torch.equal(adopted[key], weights[key]) for key in weights)


@pytest.mark.parametrize('names', [CLASSES[1:], None])
@pytest.mark.parametrize('wrapped', ['', 'module.'])
def test_a_base_without_background_gets_one(tmp_path: Path, names: list | None, wrapped: str) -> None:
    path = tmp_path / 'base.pth'
    stock = build(model_cfg(3) | dict(type='EncoderDecoder'), seed=3).eval()
    # What the checkpoint has beyond the model does no harm.
    weights = {wrapped + key: value for key, value in stock.state_dict().items()}
    weights[f'{wrapped}auxiliary_head.conv_seg.weight'] = torch.zeros(3, 2, 1, 1)
    meta = {} if names is None else dict(dataset_meta=dict(classes=names))
    write_weights(path, weights, meta)
    model = build(model_cfg(4)).eval()
    model.load_state_dict(adopt_base(model, path, CLASSES))
    with torch.no_grad():
        before, after = stock(images(), mode='tensor'), model(images(), mode='tensor')
    torch.testing.assert_close(after[:, 1:].softmax(1), before.softmax(1), atol=1e-5, rtol=1e-4)
    assert torch.equal(after.argmax(1), before.argmax(1) + 1)


@pytest.mark.parametrize('listed', [False, True])
def test_all_heads_of_a_base_get_a_background(tmp_path: Path, listed: bool) -> None:
    def heads(num_classes: int) -> Any:
        head = auxiliary_head_cfg(num_classes)
        return [head, auxiliary_head_cfg(num_classes, 2)] if listed else head

    path = tmp_path / 'base.pth'
    weights = save_base(path, 3, CLASSES[1:], auxiliary_head=heads(3))
    model = build(model_cfg(4, auxiliary_head=heads(4)))
    adopted = adopt_base(model, path, CLASSES)
    for key in (key for key in weights if 'conv_seg' in key):
        torch.testing.assert_close(adopted[key], torch.cat([weights[key].mean(0)[None], weights[key]]))


def test_a_base_without_the_models_auxiliary_head_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'base.pth'
    save_base(path, 3, CLASSES[1:])
    model = build(model_cfg(4, auxiliary_head=auxiliary_head_cfg(4)))
    with pytest.raises(ValueError, match=r'base\.pth.*auxiliary_head\.conv_seg\.weight: missing'):
        adopt_base(model, path, CLASSES)


@pytest.mark.parametrize(
    'names',
    [
        ['background', 'square', 'circle', 'star'],
        ['background', 'circle', 'square', 'moon'],
        ['square', 'circle', 'star'],
    ],
    ids=['order', 'name', 'order without background'],
)
def test_a_base_of_other_classes_is_refused(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / 'base.pth'
    save_base(path, len(names), names)
    expected = re.escape(f'{path} was trained on classes {names}, expected {CLASSES[-len(names) :]}')
    with pytest.raises(ValueError, match=expected):
        adopt_base(build(model_cfg(4)), path, CLASSES)


def test_a_base_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'base.pth'
    save_base(path, 7, None)
    with pytest.raises(ValueError, match=rf'{path} does not fit stage 0: it has 7 classes, .*stage 0 has 4 '):
        adopt_base(build(model_cfg(4)), path, CLASSES)


@pytest.mark.parametrize('num_classes', [4, 3])
def test_a_base_of_another_backbone_is_refused(tmp_path: Path, num_classes: int) -> None:
    path = tmp_path / 'base.pth'
    save_base(path, num_classes, None, resnet=True)
    with pytest.raises(ValueError, match=rf'{path} does not fit stage 0 .*backbone\.layers.*: missing'):
        adopt_base(build(model_cfg(4)), path, CLASSES)


def test_a_base_that_is_a_bare_backbone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'mit.pth'
    torch.save(build(model_cfg(4)).backbone.state_dict(), path)
    with pytest.raises(ValueError, match='does not fit stage 0'):
        adopt_base(build(model_cfg(4)), path, CLASSES)

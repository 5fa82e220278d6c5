# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Rows that wait for future classes (DFT*), and classifiers in parts whose old rows are frozen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from mmseg_sats.engine.files.base import adopt_base
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from tests.small_models import auxiliary_head_cfg, build, images, model_cfg, samples, save_weights

OLD, NEW, FUTURE = 4, 6, 3
CLASSIFIER = 'decode_head.conv_seg'
DFT = Config.fromfile(Path(__file__).parents[1] / 'configs/dft/dft.py')


def waiting_cfg(num_classes: int, future: int, **options: Any) -> dict[str, Any]:
    return model_cfg(num_classes, classifier_init='future', future_classes=future, **options)


def labels() -> Tensor:
    return torch.randint(OLD, (2, 64, 64), generator=torch.Generator().manual_seed(0))


def two_stages(tmp_path: Path, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The model of a stage, and that of the stage after as it begins."""
    old = build(waiting_cfg(OLD, FUTURE, auxiliary_head=auxiliary_head_cfg(OLD)))
    path = save_weights(old, tmp_path / 'old.pth')
    later = dict(old_model=dict(checkpoint=path, num_old=OLD), auxiliary_head=auxiliary_head_cfg(NEW), **options)
    new = build(waiting_cfg(NEW, FUTURE + OLD - NEW, **later), seed=1)
    load_checkpoint(new, path)
    return old, new


def test_the_loss_is_the_cross_entropy_over_all_rows() -> None:
    model = build(waiting_cfg(OLD, FUTURE))
    losses = model.loss(images(), samples(labels()))
    logits = model.decode_head(model.extract_feat(images()))
    assert logits.shape[1] == OLD + FUTURE
    large = nn.functional.interpolate(logits, (64, 64), mode='bilinear')
    torch.testing.assert_close(losses['decode.loss_ce'], nn.functional.cross_entropy(large, labels()))
    model.parse_losses(losses)[0].backward()
    # They are negatives everywhere, so every step lowers their biases.
    assert (model.decode_head.conv_seg.future.bias.grad > 0).all()


def test_a_future_class_is_never_predicted() -> None:
    model = build(waiting_cfg(OLD, FUTURE)).eval()
    with torch.no_grad():
        model.decode_head.conv_seg.future.bias += 100
        (result, _) = model.predict(images())
        assert model(images(), mode='tensor').shape[1] == OLD
    assert result.seg_logits.data.shape == (OLD, 64, 64)


def test_new_classes_take_the_rows_that_waited_for_them(tmp_path: Path) -> None:
    old, new = two_stages(tmp_path)
    before, now = old.state_dict(), new.state_dict()
    for head in ('decode_head', 'auxiliary_head'):
        for kind in ('weight', 'bias'):
            key, waiting = f'{head}.conv_seg.{kind}', f'{head}.conv_seg.future.{kind}'
            assert torch.equal(now[key], torch.cat([before[key], before[waiting][: NEW - OLD]]))
            assert torch.equal(now[waiting], before[waiting][NEW - OLD :])
    # So no logit changes, whatever it is called.
    with torch.no_grad():
        logits = [m.eval().decode_head(m.extract_feat(images())) for m in (old, new)]
    torch.testing.assert_close(*logits)


def test_nothing_waits_behind_the_last_stage(tmp_path: Path) -> None:
    old = build(waiting_cfg(OLD, FUTURE))
    path = save_weights(old, tmp_path / 'old.pth')
    cfg = waiting_cfg(OLD + FUTURE, 0, old_model=dict(checkpoint=path, num_old=OLD), split_classifier=True)
    new = build(cfg, seed=1)
    load_checkpoint(new, path)
    assert new.state_dict().keys() == build(model_cfg(OLD + FUTURE)).state_dict().keys()
    bare = save_weights(build(model_cfg(OLD)), tmp_path / 'bare.pth')
    with pytest.raises(ValueError, match=r"'future' needs a checkpoint with rows decode_head\.conv_seg\.future"):
        load_checkpoint(new, bare)


@pytest.mark.parametrize('optimizer', [
    dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.1), dict(type='AdamW', lr=0.1)])
def test_only_new_and_future_rows_are_trained(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    _, model = two_stages(tmp_path, frozen=DFT.method_later_stages.model.frozen)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=optimizer))
    model.train()
    for _ in range(2):
        loss, _ = model.parse_losses(model.loss(images(), samples(labels())))
        wrapper.update_params(loss)
    after = model.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    kinds = ('weight', 'bias')
    assert moved == {f'{CLASSIFIER}.{k}' for k in kinds} | {f'{CLASSIFIER}.future.{k}' for k in kinds}
    for kind in kinds:
        assert torch.equal(after[f'{CLASSIFIER}.{kind}'][:OLD], before[f'{CLASSIFIER}.{kind}'][:OLD])


def test_a_base_that_lacks_the_rows_gets_them(tmp_path: Path) -> None:
    base, model = build(model_cfg(OLD)), build(waiting_cfg(OLD, FUTURE), seed=1)
    path = save_weights(base, tmp_path / 'base.pth')
    found = adopt_base(model, Path(path), ['background', 'a', 'b', 'c'])
    assert torch.equal(found[f'{CLASSIFIER}.weight'], base.state_dict()[f'{CLASSIFIER}.weight'])
    assert torch.equal(found[f'{CLASSIFIER}.future.weight'], model.state_dict()[f'{CLASSIFIER}.future.weight'])


def test_a_run(shapes_cfg: Any, tmp_path: Path) -> None:
    RUNNERS.build(shapes_cfg('dft', protocol='4-1')).train()
    first, second, last = (
        load_checkpoint_safely(tmp_path / f'run/stage_{k}/snapshot.pth')['state_dict'] for k in range(3))  # fmt: skip
    assert [len(state[f'{CLASSIFIER}.future.bias']) for state in (first, second)] == [2, 1]
    assert last.keys() == first.keys() - {f'{CLASSIFIER}.future.{kind}' for kind in ('weight', 'bias')}
    for key in first.keys() - {f'{CLASSIFIER}.{x}' for x in ('weight', 'bias', 'future.weight', 'future.bias')}:
        assert torch.equal(last[key], first[key]), key
    assert torch.equal(last[f'{CLASSIFIER}.weight'][:6], second[f'{CLASSIFIER}.weight'])
    assert not torch.equal(last[f'{CLASSIFIER}.weight'][6:], second[f'{CLASSIFIER}.future.weight'])

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""``data_preprocessor.test_cfg`` pads the images of a test batch, not their labels: what is padded counts nowhere."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_sats.engine.hooks.methods import prototype_hook
from mmseg_sats.engine.hooks.methods.image_pass import training_images_once
from mmseg_sats.engine.hooks.methods.prototype_hook import PrototypeHook
from mmseg_sats.engine.hooks.methods.pseudo_label_threshold_hook import PseudoLabelThresholdHook
from mmseg_sats.models.padding import with_padding, without_padding
from mmseg_sats.models.prototypes import ClassPrototypes
from mmseg_sats.models.segmentor_output import SegmentorOutput
from mmseg_sats.visualization import attention_view
from mmseg_sats.visualization.stage_model import eval_dataset, load_stage


class Loading:
    """As much of a runner as the passes over the training images use."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def build_dataloader(self, loader: dict) -> object:
        return Runner.build_dataloader(loader, seed=0)


@pytest.fixture(scope='module')
def padding_cfg(tiny_runs: list[Path]) -> Config:
    """A stage whose images of 64 pixels are padded to 96."""
    cfg = Config.fromfile(tiny_runs[0] / 'stage_1/config.py')
    cfg.model.data_preprocessor.test_cfg = dict(size_divisor=48)
    return cfg


def padded(size: tuple[int, int] = (0, 32)) -> list[SegDataSample]:
    height, width = size
    return [SegDataSample(metainfo=dict(img_padding_size=(0, width, 0, height)))]


def test_labels_cover_the_padded_images() -> None:
    labels = torch.arange(6).view(1, 2, 3)
    assert with_padding(labels, [SegDataSample()], (2, 3)) is labels
    found = with_padding(labels, padded((1, 2)), (3, 5))
    assert found.tolist() == [[[0, 1, 2, 255, 255], [3, 4, 5, 255, 255], [255] * 5]]
    # Labels at the size of the file, the images resized to twice as much.
    found = with_padding(labels, padded((0, 2)), (4, 8))
    assert found.tolist() == [[[0, 0, 1, 1, 2, 2, 255, 255]] * 2 + [[3, 3, 4, 4, 5, 5, 255, 255]] * 2]


def test_logits_are_those_of_the_images_alone() -> None:
    logits = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    output = SegmentorOutput(logits, (), unknown=logits[:, :1])
    assert without_padding(output, [SegDataSample()], (32, 48)) is output
    found = without_padding(output, padded((0, 16)), (32, 48))
    torch.testing.assert_close(found.logits, F.interpolate(logits, (32, 48), mode='bilinear')[..., :32])
    assert torch.equal(found.unknown, found.logits[:, :1])


def test_thresholds_are_those_of_what_the_old_model_predicts(padding_cfg: Config) -> None:
    torch.manual_seed(0)
    model = MODELS.build(padding_cfg.model).eval()
    old = model.old_model.model
    torch.nn.init.normal_(old.decode_head.conv_seg.weight, std=2.0)  # predictions that differ from place to place
    PseudoLabelThresholdHook().find(Loading(padding_cfg), model)
    old.test_cfg = model.test_cfg  # mmseg's own prediction, which takes the padding off
    entropies: dict[int, list] = {}
    for batch in Runner.build_dataloader(training_images_once(Loading(padding_cfg)), seed=0):
        data = model.data_preprocessor(batch, False)
        assert data['inputs'].shape[-1] == 96
        with torch.no_grad():
            (result,) = old.predict(data['inputs'], data['data_samples'])
        q = result.seg_logits.data.double().softmax(0)
        background = result.gt_sem_seg.data[0] == 0
        entropy = -(q * q.log()).sum(0) / torch.tensor(len(q)).double().log()
        for c in range(len(q)):
            entropies.setdefault(c, []).append(entropy[background & (q.argmax(0) == c)])
    median = [torch.cat(values).quantile(0.5) if torch.cat(values).numel() else 0 for values in entropies.values()]
    expected = torch.tensor([max(float(value), model.pseudo_labeler.floor) for value in median])
    torch.testing.assert_close(model.pseudo_labeler.thresholds, expected, atol=1e-4, rtol=0)


def test_prototypes_are_of_the_images_alone(padding_cfg: Config) -> None:
    class Means(ClassPrototypes):
        def sums_of(self, features: list, labels: torch.Tensor) -> torch.Tensor:
            assert labels.shape[1:] == (96, 96)
            assert (labels[:, 64:] == 255).all()
            assert (labels[:, :, 64:] == 255).all()
            assert (labels[:, :64, :64] != 255).any()
            return super().sums_of(features, labels)

    runner = Loading(padding_cfg)
    runner.model = MODELS.build(padding_cfg.model)
    runner.logger = type('Silent', (), dict(info=print))
    prototypes = Means(num_channels=runner.model.num_classes)
    PrototypeHook()._gather(runner, prototypes)
    assert prototypes.means.shape[0] == runner.model.num_classes


def test_a_process_without_an_image_has_the_sums_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prototype_hook, 'images_seen_once', lambda *_: [])
    others = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    monkeypatch.setattr(prototype_hook, 'all_gather_object', lambda own: [others[0], own, others[1]])
    runner = SimpleNamespace(model=torch.nn.Identity())
    assert prototype_hook._over_images(runner, lambda *_: None).tolist() == [4.0, 6.0]


def test_attention_is_that_of_the_region_in_the_image(tiny_runs: list[Path], padding_cfg: Config) -> None:
    old, new = (load_stage(tiny_runs[0] / f'stage_{k}') for k in (0, 1))
    sample = eval_dataset(new.cfg)[0]
    labels = sample['data_samples'].gt_sem_seg.data[0].long()
    channel = int(labels[labels > 0].mode().values)
    for stage in (old, new):
        stage.model.data_preprocessor.test_cfg = dict(size_divisor=48)
    views, used = attention_view.view_classes(old, new, sample, channel, labels)
    assert used is labels
    maps, covers, _ = attention_view.padded_attentions(old, new, sample, labels)
    assert covers == (64 / 96, 64 / 96)
    view, (one, *_) = next((view, pair) for view, pair in zip(views, zip(*maps, strict=True), strict=True) if view)
    assert view.covers == covers
    # Positions of the region, found pixel by pixel: a cell's label is that of its top left pixel.
    step = 96 // one.query_hw[0]
    region = torch.zeros(one.query_hw, dtype=torch.bool)
    region[: -(-64 // step), : -(-64 // step)] = labels[::step, ::step] == channel
    expected = one.dense()[0].cpu()[:, region.flatten()].mean(1)
    torch.testing.assert_close(view.old.flatten(1), expected)
    # A point in the image's middle is a third from the left of the padded one.
    (point, *_) = attention_view.point_views(*maps, (0.5, 0.5), covers)
    row = int(0.5 * covers[0] * one.query_hw[0])
    expected = one.dense()[0].cpu()[:, row * one.query_hw[1] + row]
    torch.testing.assert_close(point.old.flatten(1), expected)

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A whole SATS step against stock mmseg's fine-tuning step and its forward pass of the old model.

What a user would have without this package, and without any distillation: mmseg's own encoder,
segmentor and loss, and the old model's logits. Both sides hold an old model of the same weights.
"""

from dataclasses import replace

import torch
from mmseg.models import EncoderDecoder

from benchmarks.measure import Ratio, median_seconds, peak_bytes
from benchmarks.models import Stage, make_optimizer, model_config, stage

SPLITS = {21: (20, 1), 151: (146, 5)}
"""Old channels and new classes by the number of both: the last stages of VOC 15-1 and ADE20K 100-5."""


GOALS = {('B0', 21): (0.85, 0.85), ('B2', 21): (0.90, 0.85), ('B0', 151): (0.75, 0.60), ('B2', 151): (0.75, 0.60)}
"""What time and memory should be at most, by the encoder and the number of channels."""


def measure() -> list[Ratio]:
    """Time and peak memory for each encoder and number of classes."""
    return [ratio for size, count in GOALS for ratio in _ratios(size, count)]


def _ratios(size: str, count: int) -> list[Ratio]:
    sats = stage('sats', *SPLITS[count], size=size)
    stock, old = stock_step(sats, size, count), stock_old_model(sats, size, SPLITS[count][0])
    works = {'SATS': sats.step, 'fine-tuning': stock.step, 'old model': lambda: infer(old, sats)}
    seconds = median_seconds(works)
    name, (time_goal, memory_goal) = f'{size}, {count} classes', GOALS[size, count]
    print(f'{name}: timed', flush=True)
    # Stock's two do not run at once: the larger of the two is what it takes.
    ours = peak_bytes(sats.step) / 2**20
    theirs = max(peak_bytes(works[part]) for part in ('fine-tuning', 'old model')) / 2**20
    weights = sum(p.numel() * p.element_size() for p in old.parameters()) / 2**20
    alone = seconds['fine-tuning'] + seconds['old model']
    return [
        Ratio(
            f'time, {name}', seconds['SATS'] / alone, time_goal,
            detail=f'{seconds["SATS"]:.2f} s over {seconds["fine-tuning"]:.2f} + {seconds["old model"]:.2f} s',
        ),
        Ratio(
            f'peak memory, {name}', (ours + weights) / (theirs + weights), memory_goal,
            detail=f'{ours:.0f} over {theirs:.0f} MiB, both and {weights:.0f} MiB of the old model',
        ),
    ]  # fmt: skip


def stock_step(sats: Stage, size: str, num_classes: int) -> Stage:
    """Fine-tuning by mmseg alone, on the batch of a SATS stage."""
    model = stock_segmentor(size, num_classes).to(sats.inputs.device).train()
    return replace(sats, model=model, optimizer=make_optimizer(model))


def stock_old_model(sats: Stage, size: str, num_classes: int) -> EncoderDecoder:
    """mmseg's segmentor with the weights of a SATS stage's old model."""
    model = stock_segmentor(size, num_classes).to(sats.inputs.device).eval()
    model.load_state_dict(sats.model.old_model.model.state_dict())
    return model


def stock_segmentor(size: str, num_classes: int) -> EncoderDecoder:
    """mmseg's own SegFormer with random weights."""
    cfg = model_config(size, num_classes)
    cfg.backbone.type, cfg.decode_head.type = 'MixVisionTransformer', 'SegformerHead'
    return EncoderDecoder(cfg.backbone, cfg.decode_head, train_cfg=cfg.train_cfg, test_cfg=cfg.test_cfg)


@torch.no_grad()
def infer(model: EncoderDecoder, sats: Stage) -> None:
    """The old model's logits, at the head's resolution."""
    model(sats.inputs)

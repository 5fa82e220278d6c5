# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The picture of what a class region or a point attends to before and after a stage."""

import argparse
from pathlib import Path

import numpy as np
import torch

from mmseg_sats.utils.checkpoint import write_atomically
from mmseg_sats.utils.spelling import near_match
from mmseg_sats.visualization import attention_view, theme
from mmseg_sats.visualization.masks import rgb_image
from mmseg_sats.visualization.stage_model import (
    StageModel,
    load_sample,
    load_stage,
    mask_channels,
    previous_stage,
)


def find_channel(stage: StageModel, labels: torch.Tensor, name: str | None) -> int:
    """The channel of the class to look from.

    Raises:
        ValueError: the model does not know the class, or the labels do not hold it.
    """
    present = [c for c in labels.unique().tolist() if 0 < c < len(stage.classes)]
    names = [stage.classes[c] for c in present]
    if name is None:
        if not present:
            raise ValueError('the labels hold no class; name a point by --point X Y')
        return max(present, key=lambda c: int((labels == c).sum()))
    if name not in stage.classes[1:]:
        known = stage.classes[1:]
        raise ValueError(
            f'--class {name!r} is not known at this stage{near_match(name, known)}; '
            f'expected one of {known}'
        )
    if name not in names:
        raise ValueError(f'the labels hold no {name!r}, they hold {names}; see also --mask')
    return stage.classes.index(name)


def draw(args: argparse.Namespace) -> Path:
    """Draws the picture; returns its path."""
    new = load_stage(args.stage_dir)
    old = load_stage(previous_stage(args.stage_dir))
    sample = load_sample(new, args.image)
    image = rgb_image(sample['inputs'])
    if args.point:
        where, what = tuple(args.point), f'the point ({args.point[0]:g}, {args.point[1]:g})'
        if not (0 <= where[0] < image.shape[1] and 0 <= where[1] < image.shape[0]):
            raise ValueError(
                f'{what} is outside the image of {image.shape[1]} x {image.shape[0]} pixels'
            )
        maps, covers, _ = attention_view.padded_attentions(old, new, sample)
        point = (where[0] / image.shape[1], where[1] / image.shape[0])
        views = attention_view.point_views(*maps, point, covers)
    else:
        labels = mask_channels(new, args.mask) if args.mask else new.predict(sample)
        channel = find_channel(new, labels, args.class_name)
        views, labels = attention_view.view_classes(old, new, sample, channel, labels)
        where, what = np.asarray(labels == channel), new.classes[channel]
        source = args.mask or f"{args.stage_dir.name}'s prediction (--mask FILE for the truth)"
        print(f'{what}: its region is that of {source}')
    with theme.style():
        figure = attention_view.draw_attention(image, views, what, where)
        theme.lay_out(figure)
        content = theme.render(figure, 'png', 'white', theme.PAPER_DPI)
    out = args.out or args.stage_dir / f'{args.image.stem}_attention.png'
    write_atomically(out, lambda file: file.write(content))
    for number, view in enumerate(views):
        told = 'too small for this grid' if view is None else f'{view.distance:.6g}'
        print(f'block {number + 1}: distance {told}')
    return out

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Reading the masks, relabelling them, and whether one worker keeps a training fed."""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from PIL import Image
from torch.optim import AdamW

import mmseg_sats  # noqa: F401  registers the parts
from benchmarks.measure import Ratio, Work, device, median_seconds, peak_bytes
from benchmarks.voc_size import LIST, make_pairs, repeat, where_from
from mmseg_sats.datasets.class_index import mask_scan
from mmseg_sats.datasets.class_index.index import ClassIndex
from mmseg_sats.datasets.class_index.mask_scan import scan_masks
from mmseg_sats.datasets.transforms import RelabelSegMap, relabel_table
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.run_plan import build_protocol
from mmseg_sats.protocol import Protocol

CONFIG = Path(__file__).resolve().parents[1] / 'configs/finetune/segformer_b0_voc_mini_15-1.py'
MASKS, FEW_MASKS, DISTINCT = 10582, 1000, 300
CROP, BATCH, STEPS = 256, 12, 15


def measure() -> list[Ratio]:
    """The ratios; prints what the data is."""
    print(f'{MASKS} masks of VOC\'s size: {DISTINCT} of {where_from()}')
    quiet = patch.object(mask_scan, '_SHOW_PROGRESS', MASKS + 1)
    with tempfile.TemporaryDirectory() as folder, quiet:
        root = Path(folder, 'voc')
        masks = make_pairs(root, DISTINCT)
        files = repeat(masks, Path(folder, 'masks'), MASKS)
        return [
            *index_ratios(files, Path(folder, 'cache')),
            memory(files),
            relabelling(masks[0]),
            waiting(root, Path(folder, 'run')),
        ]


def index_ratios(files: Sequence[str], cache: Path) -> list[Ratio]:
    """Two processes against one, and the cache against a scan; time that passes."""
    few = files[:FEW_MASKS]
    alone, shared = (processor_seconds(lambda n=n: scan_masks(few, workers=n)) for n in (1, 2))
    print(f'processor time of {FEW_MASKS} masks: {sum(alone):.3g} s in one process; '
          f'{shared[0]:.3g} s and, in two others, {shared[1]:.3g} s', flush=True)
    ClassIndex.load_or_scan(files, cache_dir=cache)
    seconds = median_seconds(
        {
            'one': lambda: scan_masks(files, workers=1),
            'two': lambda: scan_masks(files, workers=2),
            'cached': lambda: ClassIndex.load_or_scan(files, cache_dir=cache),
        },
        warmup=0,
        wall=True,
    )
    one, two, cached = seconds['one'], seconds['two'], seconds['cached']
    return [
        Ratio('scan by 1 process over 2', one / two, 1.7, True, f'{one:.3g} s over {two:.3g} s'),
        # One process loads, so that its goal is against the scan by one.
        *(
            Ratio(
                f'cached load over the scan by {workers}', cached / scan, goal,
                detail=f'{cached * 1e3:.0f} ms over {scan:.3g} s',
            )
            for workers, scan, goal in ((1, one, 0.01), (2, two, None))
        ),
    ]  # fmt: skip


def processor_seconds(work: Work) -> tuple[float, float]:
    """What ``work`` costs this process and its children: on a busy machine, too, what it would save."""
    before = os.times()
    work()
    after = os.times()
    own, children = (
        sum(getattr(after, name) - getattr(before, name) for name in names)
        for names in (('user', 'system'), ('children_user', 'children_system'))
    )
    return own, children


def memory(files: Sequence[str]) -> Ratio:
    """The peak above the start, with ten times the masks; in one process, which is all that counts."""
    many, few = (
        peak_bytes(lambda chosen=chosen: scan_masks(chosen, workers=1), host=True) / 2**20
        for chosen in (files, files[:FEW_MASKS])
    )
    detail = f'{many:.2f} MiB over {few:.2f} MiB'
    return Ratio(f'memory of {len(files)} masks over {FEW_MASKS}', many / few, detail=detail)


def relabelling(mask: Path) -> Ratio:
    """A table against a function called for every pixel, on one mask."""
    labels = np.array(Image.open(mask))
    table = relabel_table(Protocol('15-1', 20), 1)
    transform = RelabelSegMap(table)
    known = {label: int(new) for label, new in enumerate(table)}

    def by_table() -> np.ndarray:
        return transform.transform({'gt_seg_map': labels})['gt_seg_map']

    def by_function() -> np.ndarray:
        return np.vectorize(lambda label: known[label], otypes=[np.uint8])(labels)

    if not np.array_equal(by_table(), by_function()):
        raise AssertionError('the two ways of relabelling differ')
    seconds = median_seconds({'table': by_table, 'function': by_function}, repeats=21)
    table_us, function_us = seconds['table'] * 1e6, seconds['function'] * 1e6
    detail = f'{function_us:.0f} us over {table_us:.0f} us'
    return Ratio('relabelling by a function over the table', function_us / table_us, 100, True, detail)


def waiting(root: Path, work_dir: Path) -> Ratio:
    """How much of a training's time passes in waiting for the single worker."""
    init_default_scope('mmseg')
    cfg = stage_config(root, work_dir)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    model = MODELS.build(cfg.model).to(device()).train()
    optimizer = AdamW(model.parameters(), 1e-4)
    batches = iter(loader)
    waited = total = 0.0
    for step in range(STEPS + 1):
        start = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if 'loss' in name).backward()
        optimizer.step()
        losses['decode.loss_ce'].item()
        if step:  # The first waits for the worker to start.
            waited += ready - start
            total += time.perf_counter() - start
    detail = f'{waited / STEPS * 1e3:.0f} ms of {total / STEPS:.3g} s a step of {BATCH} images'
    return Ratio(f'waiting of SegFormer-B0 at {CROP}, 1 worker', waited / total, detail=detail)


def stage_config(root: Path, work_dir: Path) -> Config:
    """The first stage of fine-tuning SegFormer-B0 on the data below ``root``."""
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(
        dict(
            data_root=str(root), train_list=LIST, pretrained=None, crop_size=CROP, batch_size=BATCH,
            num_workers=1,
        )
    )  # fmt: skip
    protocol = build_protocol(cfg)
    result = build_stage_config(cfg, protocol, protocol.stage(0), work_dir)
    result.train_dataloader.dataset.cache_dir = str(work_dir / 'cache')
    return result

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Train FT, SATS and joint on the embedded data, and show what each forgets."""

import argparse
import json
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from mmseg_sats.utils.installed import CONFIGS

CONFIG = 'segformer_tiny_shapes_3-1.py'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = 'FT, SATS and joint on the embedded data'
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/demo'),
        help='work dir of the three runs (default: work_dirs/demo); what earlier demos left there is deleted',
    )
    parser.set_defaults(run=run)


def train(method: str, out: Path, base: Path | None = None) -> dict:
    """Trains one method through all stages; returns its results."""
    from mmengine.config import Config
    from mmengine.registry import RUNNERS

    cfg = Config.fromfile(CONFIGS / method / CONFIG)
    cfg.work_dir, cfg.base = str(out / method), str(base) if base else None
    cfg.report = None  # one report for all three is written at the end
    shutil.rmtree(out / method, ignore_errors=True)
    (out / method).mkdir(parents=True)
    # The terminal only gets the tables; everything else goes to log.txt.
    with (out / method / 'log.txt').open('w') as log, redirect_stdout(log), redirect_stderr(log):
        RUNNERS.build(cfg).train()
    return json.loads((out / method / 'results.json').read_text())


def run(args: argparse.Namespace) -> None:
    """Runs the three methods and prints their tables."""
    import rich

    from mmseg_sats.engine.files.results import comparison_table, forgetting_table, stage_table
    from mmseg_sats.visualization.report.page import write_report

    out = args.out
    # The training's display is drawn here, while all else that it prints goes to a file.
    rich.reconfigure(file=sys.stdout)
    console = rich.get_console()
    start = time.perf_counter()
    runs = []
    for method, base in (
        ('sats', None),
        ('finetune', out / 'sats/stage_0/snapshot.pth'),
        ('joint', None),
    ):
        console.print(f'\nTraining {method} on the embedded data, log in {out / method}/log.txt')
        runs.append(train(method, out, base))
        console.print(
            f'{method}: mIoU in percent after each stage ({time.perf_counter() - start:.0f} s so far)'
        )
        print(stage_table(runs[-1]))
        if len(runs[-1]['stages']) > 1:
            print(forgetting_table(runs[-1]))
    console.print('\nmIoU after the last stage: base classes, classes learned later, all')
    print(comparison_table(runs))
    console.print(f'figures: {out}/*/results.json and results.csv')
    with console.status('drawing the report ...'):
        page = write_report([out / one['method'] for one in runs], out / 'report')
    console.print(f'pictures: {page}, to be opened in a browser')

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The results of docs/results.md: methods and ablations on voc_mini, resumable, several at a time.

    python benchmarks/voc_mini.py DATA_ROOT --pretrained MIT_B0 [--out work_dirs/voc_mini] [--jobs 2] [--report]

Every run is a subprocess of tools/train_incremental.py with its log beside it. Run again, it goes on where
it stopped and trains nothing that is there. ``--report`` only prints the tables of what has finished.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prettytable import PrettyTable, TableStyle
from rich.console import Console

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
KEYS = ('base', 'new', 'all', 'hIoU')


@dataclass(frozen=True)
class Run:
    """One run: its name, method and protocol, the run it takes stage 0 from, and what it overrides."""

    name: str
    method: str
    protocol: str = '15-1'
    seed: int = 0
    base: str | None = None
    options: tuple[str, ...] = ()

    @property
    def config(self) -> Path:
        """Its config file."""
        return ROOT / 'configs' / self.method / f'segformer_b0_voc_mini_{self.protocol}.py'


STAGE_0 = 'sats_15-1_seed0'


def seed_runs(seed: int) -> list[Run]:
    """FT and SATS of one seed. All seeds share the stage 0 of the first: the later stages differ."""
    name = f'sats_15-1_seed{seed}'
    return [
        Run(name, 'sats', seed=seed, base=None if name == STAGE_0 else STAGE_0),
        Run(f'finetune_15-1_seed{seed}', 'finetune', seed=seed, base=STAGE_0),
    ]


def without_attention(seed: int) -> Run:
    """SATS without L_a, what L_a is measured against."""
    name = f'sats_without_attention_15-1_seed{seed}'
    options = ('distillation.attention=None',)
    return Run(name, 'sats', seed=seed, base=STAGE_0, options=options)


def ablations() -> list[Run]:
    """What each part of SATS gives, and its lambda: one seed, 15-1."""
    options = {
        'without_output': ('distillation.output=None',),
        'without_pseudo_labels': ('pseudo_labeler=None',),
        'paper_form': (
            'distillation.attention.distance=squared_l2',
            'distillation.attention.normalisation=paper',
        ),
        **{
            f'lambda_a_{weight}': (f'distillation.attention.loss_weight={weight}',)
            for weight in (5, 80, 320)
        },
    }
    return [
        Run(f'sats_{name}_15-1_seed0', 'sats', base=STAGE_0, options=value)
        for name, value in options.items()
    ]


def all_runs() -> list[Run]:
    """Every run, the most wanted first."""
    later = [
        Run(f'{method}_15-5_seed0', method, '15-5', base=STAGE_0) for method in ('sats', 'finetune')
    ]
    methods = [run for seed in SEEDS for run in seed_runs(seed)]
    joint = [Run(f'joint_15-1_seed{seed}', 'joint', seed=seed) for seed in SEEDS]
    return [*methods, *map(without_attention, SEEDS), *joint, *ablations(), *later]


def write_split(data_root: Path, folder: Path) -> None:
    """Splits train.txt for choosing values: every fifth name, sorted, into held.txt, the rest into fit.txt."""
    names = sorted((data_root / 'ImageSets/Segmentation/train.txt').read_text().split())
    folder.mkdir(parents=True, exist_ok=True)
    fit = [name for index, name in enumerate(names) if index % 5]
    (folder / 'held.txt').write_text('\n'.join(names[::5]) + '\n')
    (folder / 'fit.txt').write_text('\n'.join(fit) + '\n')


def results_of(out: Path, run: Run) -> dict | None:
    """Its results.json, or None while a stage is missing."""
    path = out / run.name / 'results.json'
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    stages = {'15-1': 6, '15-5': 2, 'joint': 1}[results['protocol']]
    return results if len(results['stages']) == stages else None


def start(run: Run, args: argparse.Namespace) -> subprocess.Popen:
    """Starts a run, or goes on with it."""
    folder = args.out / run.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(ROOT / 'tools/train_incremental.py'),
        str(run.config),
        '--work-dir',
        str(folder),
        '--resume',
    ]
    if run.base:
        command += ['--base', str(args.out / run.base / 'stage_0/snapshot.pth')]
    command += [
        '--cfg-options',
        f'data_root={args.data_root}',
        f'pretrained={args.pretrained}',
        f'seed={run.seed}',
        *run.options,
        *args.options,
    ]
    threads = str(args.threads or max(1, (os.cpu_count() or 1) // args.jobs))
    with (folder / 'log.txt').open('a') as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | dict(OMP_NUM_THREADS=threads)
        )


def is_ready(run: Run, args: argparse.Namespace) -> bool:
    """Whether the stage 0 it starts from is there."""
    return run.base is None or (args.out / run.base / 'stage_0/done').exists()


def run_all(runs: Sequence[Run], args: argparse.Namespace, console: Console) -> None:
    """Trains what is missing, ``args.jobs`` at a time; a run that fails is named and left."""
    waiting = [run for run in runs if results_of(args.out, run) is None]
    running: dict[Run, subprocess.Popen] = {}
    with console.status('') as status:
        while waiting or running:
            for run in [run for run, process in running.items() if process.poll() is not None]:
                code = running.pop(run).returncode
                console.print(
                    f'{time.strftime("%H:%M:%S")} {run.name}: '
                    + (
                        'finished'
                        if code == 0
                        else f'exit status {code}, see {args.out / run.name / "log.txt"}'
                    )
                )
            ready = [run for run in waiting if is_ready(run, args)]
            if not ready and not running:
                console.print(
                    f'left, since their stage 0 is missing: {[run.name for run in waiting]}'
                )
                return
            for run in ready[: args.jobs - len(running)]:
                waiting.remove(run)
                running[run] = start(run, args)
            status.update(
                f'{len(waiting)} runs waiting, running: {", ".join(run.name for run in running)}'
            )
            time.sleep(2)


def report(runs: Sequence[Run], out: Path) -> str:
    """The finished runs as a markdown table, and means over seeds where there are several."""
    table = PrettyTable(['run', *KEYS, 'average', 'forgetting'])
    table.set_style(TableStyle.MARKDOWN)
    groups: dict[str, list[list[float | None]]] = {}
    for run in runs:
        results = results_of(out, run)
        if results is not None:
            row = [
                *(results['final'][key] for key in KEYS),
                results['average_all'],
                results['forgetting'],
            ]
            table.add_row([run.name, *('-' if value is None else f'{value:.2f}' for value in row)])
            groups.setdefault(run.name.rpartition('_seed')[0], []).append(row)
    for name, rows in groups.items():
        if len(rows) > 1:
            cells = [
                '-'
                if None in column
                else f'{statistics.mean(column):.2f} ± {statistics.stdev(column):.2f}'
                for column in zip(*rows, strict=True)
            ]
            table.add_row([f'{name}, mean of {len(rows)} seeds', *cells])
    return table.get_string()


def main() -> None:
    """Trains and reports."""
    parser = argparse.ArgumentParser(description='The results of docs/results.md')
    parser.add_argument('data_root', type=Path, help='voc_mini')
    parser.add_argument('--pretrained', type=Path, help="MiT-B0 weights in mmseg's names")
    parser.add_argument('--out', type=Path, default=Path('work_dirs/voc_mini'))
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time; they share the cores')
    parser.add_argument(
        '--threads', type=int, help='of each run (default: the cores over the jobs)'
    )
    parser.add_argument(
        '--only',
        nargs='+',
        choices=[run.name for run in all_runs()],
        metavar='RUN',
        help='names of the runs wanted',
    )
    parser.add_argument(
        '--options', nargs='*', default=[], metavar='K=V', help='further --cfg-options for all'
    )
    parser.add_argument(
        '--write-split', type=Path, metavar='DIR', help='only write fit.txt and held.txt'
    )
    parser.add_argument('--report', action='store_true', help='train nothing')
    args = parser.parse_args()
    if args.write_split:
        write_split(args.data_root, args.write_split)
        return
    if args.pretrained is None and not args.report:
        parser.error("--pretrained is missing: MiT-B0 weights in mmseg's names")
    runs = [run for run in all_runs() if not args.only or run.name in args.only]
    if not args.report:
        run_all(runs, args, Console())
    print(report(runs, args.out))


if __name__ == '__main__':
    main()

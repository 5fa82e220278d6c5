# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Run the benchmarks, print their ratios, and compare them with those on file."""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from prettytable import PrettyTable, TableStyle

from benchmarks.measure import PRECISIONS, Ratio, device

ROOT = Path(__file__).resolve().parents[1]
ON_FILE = ROOT / f'benchmarks/ratios_{device().type}.json'
BENCHMARKS = {
    'step': 'a SATS step over a fine-tuning step and the old model',
    'against_stock': "a SATS step over stock mmseg's fine-tuning step and old model",
    'crp': 'pooled attention against the dense map and against a loop',
    'backbone': 'the attention backbones against mmseg\'s own',
    'many_classes': 'a step with 21, 151 and 1000 classes',
    'data': 'class index, relabelling, loader',
    'stages': 'the border between two stages, over many stages',
    'whole_stage': 'where the seconds of a stage go',
    'growth': 'how time and memory grow with classes, pixels, images and stages',
    'startup': 'how long the command takes to answer',
    'throughput': 'images a second of MiT-B0, B2 and B5 (on a GPU)',
}
WORSE = 0.15


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='benchmarks: ' + '; '.join(f'{name}: {what}' for name, what in BENCHMARKS.items()),
    )
    parser.add_argument('names', nargs='*', metavar='NAME', help='default: all')
    action = parser.add_mutually_exclusive_group()
    action.add_argument('--check', action='store_true', help='compare with the ratios on file')
    action.add_argument('--write', action='store_true', help='put the ratios on file')
    parser.add_argument('--file', type=Path, default=ON_FILE, help=f'default: benchmarks/{ON_FILE.name}')
    parser.add_argument(
        '--precisions', nargs='+', choices=PRECISIONS,
        help='of throughput, default: all; --write keeps the ratios of the others',
    )  # fmt: skip
    parser.add_argument('--threads', type=int, default=1, help='of torch (default: 1)')
    args = parser.parse_args(argv)
    unknown = set(args.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f'{", ".join(sorted(unknown))}: expected some of {", ".join(BENCHMARKS)}')
    if args.precisions and (args.check or args.names != ['throughput']):
        parser.error('--precisions: expected throughput alone, and no --check')
    on_file = json.loads(args.file.read_text()) if args.file.exists() else {}
    print(machine(args.threads))
    measured = {}
    for name in args.names or BENCHMARKS:
        measured[name] = run(name, args.threads, args.precisions)
        if args.write and measured[name]:  # after each: the next may be stopped
            kept = on_file.get(name, {}) if args.precisions else {}
            on_file |= {name: kept | {ratio.name: ratio.value for ratio in measured[name]}}
            args.file.write_text(json.dumps(on_file, indent=2, sort_keys=True) + '\n')
    return compare(measured, on_file) if args.check else 0


def machine(threads: int) -> str:
    """The machine in one line."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return f'{name}, {threads} of {os.cpu_count()} threads, torch {torch.__version__}'


def processor() -> str:
    """The CPU's name, as the kernel tells it."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def run(name: str, threads: int, precisions: Sequence[str] | None = None) -> list[Ratio]:
    """One benchmark in a process of its own, so that none inherits another's memory."""
    print(f'\n{name}: {BENCHMARKS[name]}', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'ratios.json'
        code = f'from benchmarks.__main__ import measure; measure({name!r}, {str(path)!r}, {precisions!r})'
        subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', code],
            check=True,
            cwd=ROOT,
            env=dict(os.environ, OMP_NUM_THREADS=str(threads)),
        )
        ratios = [Ratio(**entry) for entry in json.loads(path.read_text())]
    if not ratios:  # it has said why
        return ratios
    table = PrettyTable(['ratio', 'measured', 'goal', 'met', 'of what'])
    table.set_style(TableStyle.MARKDOWN)
    table.align = 'l'
    for ratio in ratios:
        met = '' if ratio.limit is None else 'yes' if ratio.met else 'NO'
        table.add_row([ratio.name, f'{ratio.value:.3g}', goal(ratio), met, ratio.detail])
    print(table, flush=True)
    return ratios


def measure(name: str, path: str, precisions: Sequence[str] | None = None) -> None:
    """Runs one benchmark here, in those precisions if any are given; leaves its ratios in the JSON file ``path``."""
    ratios = importlib.import_module(f'benchmarks.{name}').measure(*[precisions] * bool(precisions))
    Path(path).write_text(json.dumps([ratio.to_dict() for ratio in ratios]))


def goal(ratio: Ratio) -> str:
    """The goal in words."""
    if ratio.limit is None:
        return ''
    return f'{"at least" if ratio.more_is_better else "at most"} {ratio.limit:g}'


def compare(
    measured: Mapping[str, Sequence[Ratio]], on_file: Mapping[str, Mapping[str, float]]
) -> int:
    """Prints each measured ratio beside that on file, and what got worse; 1 if anything did."""
    table = PrettyTable(['benchmark', 'ratio', 'on file', 'now'])
    table.set_style(TableStyle.MARKDOWN)
    table.align = 'l'
    worse = []
    for name, ratios in measured.items():
        for ratio in ratios:
            before = on_file.get(name, {}).get(ratio.name)
            table.add_row(
                [name, ratio.name, '-' if before is None else f'{before:.3g}', f'{ratio.value:.3g}']
            )
            if before is not None and got_worse(before, ratio):
                worse.append(f'{name}: {ratio.name} was {before:.3g}, is {ratio.value:.3g}')
        for lost in on_file.get(name, {}).keys() - {ratio.name for ratio in ratios}:
            worse.append(f'{name}: {lost} is on file and was not measured')
    print(f'\n{table}')
    print('\n'.join([f'Worse by more than {WORSE:.0%}:', *worse] if worse else ['Nothing got worse.']))
    return 1 if worse else 0


def got_worse(before: float, now: Ratio) -> bool:
    """Whether a ratio is more than ``WORSE`` away from that on file, on the wrong side."""
    if now.more_is_better:
        return now.value < before / (1 + WORSE)
    return now.value > before * (1 + WORSE)


if __name__ == '__main__':
    sys.exit(main())

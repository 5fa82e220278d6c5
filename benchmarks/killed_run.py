# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A run that is killed in its second stage and resumed: that it ends, how long it takes, its mIoU.

python -m benchmarks.killed_run CONFIG --work-dir DIR [more words for mmseg-sats train]
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TRAIN = (sys.executable, '-W', 'ignore', '-m', 'mmseg_sats', 'train')
LOOK = 0.05
"""Seconds between two looks at the run's folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--work-dir', type=Path, required=True, help='where the run writes; must be new')
    args, words = parser.parse_known_args(argv)
    if args.work_dir.exists():
        parser.error(f'--work-dir: {args.work_dir} exists, expected a new folder')
    command = [*TRAIN, args.config, '--work-dir', str(args.work_dir), *words]
    start = time.perf_counter()
    checkpoint = kill_in_stage_1(command, args.work_dir)
    if checkpoint is None:
        print('the run ended before it could be killed')
        return 1
    print(f'killed after {time.perf_counter() - start:.0f} s, with stage_1/{checkpoint}', flush=True)
    first = (args.work_dir / 'stage_0/metrics.json').stat().st_mtime_ns
    status = subprocess.run([*command, '--resume'], check=False).returncode
    if status:
        print(f'the resumed run failed ({status})')
        return 1
    if (args.work_dir / 'stage_0/metrics.json').stat().st_mtime_ns != first:
        print('the resumed run trained stage 0 again')
        return 1
    print_table(args.work_dir, time.perf_counter() - start)
    return 0


def kill_in_stage_1(command: Sequence[str], work_dir: Path) -> str | None:
    """Starts a run and kills it at stage 1's first checkpoint; its name, or None if the run ended by itself."""
    with subprocess.Popen(command) as run:
        while run.poll() is None:
            found = sorted((work_dir / 'stage_1').glob('epoch_*.pth'))
            if found:
                run.kill()
                return found[0].name if run.wait() == -signal.SIGKILL else None
            time.sleep(LOOK)
    return None


def print_table(work_dir: Path, seconds: float) -> None:
    """Each stage's seconds of training and mIoU; at the end those of the whole run, its two starts included."""
    print('\n| stage | seconds | base, mIoU | new, mIoU | all, mIoU |\n|---|---|---|---|---|')
    for index in range(len(list(work_dir.glob('stage_*/metrics.json')))):
        stage = json.loads((work_dir / f'stage_{index}/metrics.json').read_text())
        print_row(f'{index}, training', stage['train_seconds'], stage['results']['mIoU'])
    print_row('all, with evaluation', seconds, json.loads((work_dir / 'results.json').read_text())['final'])
    print(flush=True)


def print_row(name: str, seconds: float, means: Mapping[str, float | None]) -> None:
    """One row; '-' where there is no mean, as of new classes in stage 0."""
    cells = ['-' if means[key] is None else f'{means[key]:.1f}' for key in ('base', 'new', 'all')]
    print(f'| {name} | {seconds:.1f} | {" | ".join(cells)} |')


if __name__ == '__main__':
    sys.exit(main())

# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Find out why a run forgets classes: confusion, classifier, encoder, attention and pseudo-labels of its stages."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = 'Why a run forgets classes: its figures, and a sentence for each finding'
    parser.add_argument('work_dir', type=Path, help="a run's work dir")
    parser.add_argument('--stage', type=int, metavar='K', help='this stage only (default: every finished one)')
    parser.add_argument(
        '--images', type=int, metavar='N', help='images of each pass, always the same ones (default: all)'
    )
    parser.add_argument('--device', help='where the models run (default: the GPU, if there is one)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes diagnosis.json and diagnosis.html, and prints the largest effects."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from mmseg_sats.engine.command_line import message_of
    from mmseg_sats.engine.diagnosis.write import write_diagnosis
    from mmseg_sats.utils.writable import check_writable

    check_writable(args.work_dir / 'diagnosis.json', str(args.work_dir))
    try:
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:  # torch's messages about a device that does not exist
        raise SystemExit(f'--device {args.device}: {error}') from error
    console = Console(stderr=True)
    try:
        found = write_diagnosis(
            args.work_dir, args.stage, args.images, args.device,
            lambda images, doing: track(images, description=doing, console=console),
        )  # fmt: skip
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise SystemExit(message_of(error)) from error
    for sentence in found['largest']:
        print(sentence)
    print(f'wrote {args.work_dir / "diagnosis.html"}, and all figures in diagnosis.json beside it')

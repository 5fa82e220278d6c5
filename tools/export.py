# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Writes a stage's model as config and checkpoint for an mmseg without this package, and as ONNX.

python tools/export.py work_dirs/sats/segformer_b2_voc_15-1/stage_5 [--out DIR] [--onnx]
"""

import argparse
from pathlib import Path

from rich.console import Console

from mmseg_sats.engine.export.onnx import check_onnx_installed, export_onnx
from mmseg_sats.engine.export.stock import export_stage, load_for_export


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Write a stage's model for an mmseg without this package"
    )
    parser.add_argument('stage_dir', type=Path, help='folder of a finished stage: WORK_DIR/stage_K')
    parser.add_argument('--out', type=Path, help='where to write (default: STAGE_DIR/export)')
    parser.add_argument(
        '--onnx',
        action='store_true',
        help='write model.onnx too, compared with PyTorch at two image sizes',
    )
    return parser.parse_args()


def main() -> None:
    """Writes the files and says how to use them."""
    args = parse_args()
    out = args.out or args.stage_dir / 'export'
    try:
        if args.onnx:
            check_onnx_installed()
        config, checkpoint = export_stage(args.stage_dir, out)
        print(f"stock mmseg computes the same: init_model('{config}', '{checkpoint}')")
        if args.onnx:
            with Console().status('writing ONNX and comparing it with PyTorch; this takes a minute or more'):
                worst = export_onnx(load_for_export(args.stage_dir)[1], out / 'model.onnx')
            print(f'{out / "model.onnx"}: onnxruntime differs from PyTorch by {worst:.1e} at most')
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == '__main__':
    main()

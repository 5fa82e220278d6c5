# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Write a stage's model for an mmseg without this package, and as ONNX."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = "Write a stage's model for an mmseg without this package"
    parser.add_argument('stage_dir', type=Path, help='folder of a finished stage: WORK_DIR/stage_K')
    parser.add_argument('--out', type=Path, help='where to write (default: STAGE_DIR/export)')
    parser.add_argument(
        '--onnx',
        action='store_true',
        help='write model.onnx too, compared with PyTorch at two image sizes',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes the files and says how to use them."""
    from mmengine.config import Config
    from rich.console import Console

    from mmseg_sats.engine.export.onnx import check_onnx_installed, export_onnx
    from mmseg_sats.engine.export.stock import export_stage, load_for_export

    out = args.out or args.stage_dir / 'export'
    try:
        if args.onnx:
            check_onnx_installed()
        config, checkpoint = export_stage(args.stage_dir, out)
        print(f"stock mmseg computes the same: init_model('{config}', '{checkpoint}')")
        own = Config.fromfile(config, import_custom_modules=False).get('custom_imports')
        if own:
            print(f'where Python finds {", ".join(own.imports)}: name the folder by PYTHONPATH')
        if args.onnx:
            with Console().status('writing ONNX and comparing it with PyTorch; this takes a minute or more'):
                worst = export_onnx(load_for_export(args.stage_dir)[1], out / 'model.onnx')
            print(f'{out / "model.onnx"}: onnxruntime differs from PyTorch by {worst:.1e} at most')
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise SystemExit(str(error)) from error

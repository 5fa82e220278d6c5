# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The report that a run writes at its end."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import is_distributed

# Environment variables by which the report's process would take itself for a rank of the run.
_RANK_VARIABLES = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')


def check_report(options: Mapping[str, Any] | None) -> None:
    """Raises ValueError for options that the report does not have, before anything is trained."""
    if options is not None:
        # Imported here and below, so that matplotlib is imported only for a run with a report.
        from mmseg_sats.visualization.report.page import check_report_options

        check_report_options(options)


def report_at_end(work_dir: Path, options: Mapping[str, Any] | None) -> None:
    """Writes ``WORK_DIR/report``. Only the main process calls this.

    In a distributed run the report is written by a new process, because the data sets synchronise all
    ranks when they read data and the other ranks have ended by now. An error in the report is only a
    warning.

    Args:
        work_dir: the run's work dir, with all stages finished.
        options: the config's ``report``; None writes nothing.
    """
    if options is None:
        return
    from mmseg_sats.visualization.report.page import check_report_options, write_run_report

    if not is_distributed():
        write_run_report(work_dir, options)
        return
    words = [f'--{name}={value}' for name, value in check_report_options(options).items()]
    environment = {key: os.environ[key] for key in os.environ if key not in _RANK_VARIABLES}
    command = [sys.executable, '-m', 'mmseg_sats', 'report', str(work_dir), *words]
    subprocess.run(command, env=environment, check=False)

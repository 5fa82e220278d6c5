# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Writes the diagnosis of a run: its figures as JSON, and a page."""

from pathlib import Path
from typing import Any

from mmseg_sats.engine.diagnosis.diagnose import Track, diagnose
from mmseg_sats.engine.diagnosis.sentences import LACKING, findings, worth
from mmseg_sats.utils.checkpoint import write_json
from mmseg_sats.visualization.report.diagnosis_page import write_page

LARGEST = 6  # findings that the page starts with


def write_diagnosis(
    work_dir: Path, only: int | None, images: int | None, device: str | None, track: Track
) -> dict[str, Any]:
    """Diagnoses a run and writes ``diagnosis.json`` and ``diagnosis.html`` into its work dir, anew after each stage.

    Args:
        work_dir: the run's.
        only: as for ``diagnose``.
        images: as for ``diagnose``.
        device: as for ``diagnose``.
        track: as for ``diagnose``.

    Returns:
        The contents of the file: ``run``, the work dir's name, ``images``, ``skipped``, reasons by stage, ``stages``,
        ``findings``, and ``largest``: what learning was worth, and the sentences on what is known least.

    Raises:
        FileNotFoundError: as ``diagnose`` does.
        ValueError: as ``diagnose`` does, or no stage has images.
    """
    skipped = {
        path.name: 'it has no snapshot'
        for path in sorted(work_dir.glob('stage_*'))
        if path.is_dir() and not (path / 'snapshot.pth').is_file()
    }
    result: dict[str, Any] = dict(run=work_dir.resolve().name, images=images, skipped=skipped, stages=[])
    for stage in diagnose(work_dir, only, images, device, track):
        if 'skipped' in stage:
            skipped[f"stage_{stage['stage']}"] = stage['skipped']
            continue
        result['stages'].append(stage)
        result['findings'] = told = findings(result['stages'])
        largest = [finding['text'] for finding in told if finding['part'] in LACKING][:LARGEST]
        result['largest'] = worth(result['stages']) + largest
        write_json(work_dir / 'diagnosis.json', result)
        write_page(result, work_dir / 'diagnosis.html')
    if not result['stages']:
        raise ValueError(next(iter(skipped.values())))
    return result

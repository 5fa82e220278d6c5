# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The page of a diagnosis: a sentence for each finding, and tables of all classes over the stages."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmseg_sats.utils.checkpoint import write_text
from mmseg_sats.visualization.report.rendering import render

# Name, heading, and what the figures are.
PARTS = (
    (
        'confusion', 'What the pixels of each class are predicted as',
        'Percent of the pixels of a class in the evaluation images; other classes from 5 % on, three at most.',
    ),
    (
        'oracle', 'What the encoder still knows',
        'IoU of the model, and behind it that of an oracle: a ridge regression on the input of the classifier, with '
        'the true labels of all seen classes in the training images so far. No method has these labels. What the '
        'oracle tells apart and the model does not is lost in the classifier alone; the encoder means all that '
        'comes before the classifier.',
    ),
    ('classifier', "The classifier's rows", 'Bias, and behind it the norm of the weights.'),
    (
        'attention', 'How far each stage moved the attention',
        'The term of each class in the attention loss L_a between the model and the one before, block by block, on the '
        'evaluation images; 0 where nothing moved.',
    ),
    (
        'pseudo_labels', 'The pseudo-labels against the true labels',
        "Of the background pixels in the stage's training images: the percentage that is labelled as the class, the "
        'precision of these labels, and their recall.',
    ),
)  # fmt: skip
BESIDE = dict(confusion='learning')  # sentences that stand with those of another part
SHOWN = 8  # sentences of a part


def write_page(diagnosis: Mapping[str, Any], path: Path) -> None:
    """Writes the page.

    Args:
        diagnosis: the contents of ``diagnosis.json``.
        path: the file to write.
    """
    stages, told = diagnosis['stages'], diagnosis['findings']
    parts = [
        dict(
            title=title,
            what=what,
            sentences=[finding['text'] for finding in told if finding['part'] in (name, BESIDE.get(name))][:SHOWN],
            left_out=_left_out(stages, name),
            rows=_rows(stages, CELLS[name]) if any(stage[name] is not None for stage in stages) else [],
        )
        for name, title, what in PARTS
    ]
    write_text(path, render('diagnosis.html.j2', dict(diagnosis, parts=parts)))


def _left_out(stages: list[dict[str, Any]], name: str) -> list[str]:
    """Why stages lack a part, with the stages that share a reason named together."""
    reasons: dict[str, list[str]] = {}
    for stage in stages:
        if name in stage['left_out']:
            reasons.setdefault(stage['left_out'][name], []).append(str(stage['stage']))
    return [f'Not measured after stage {", ".join(numbers)}: {reason}.' for reason, numbers in reasons.items()]


def _rows(stages: list[dict[str, Any]], cell: Callable[[dict[str, Any], str], str]) -> list[tuple[str, list[str]]]:
    """Per class its cell of each stage; classes without any are left out."""
    table = [
        (name, [cell(stage, name) if name in stage['classes'] else '' for stage in stages])
        for name in stages[-1]['classes']
    ]
    return [row for row in table if any(row[1])]


def _confusion(stage: dict[str, Any], name: str) -> str:
    counts = stage['confusion'][stage['classes'].index(name)]
    if not sum(counts):
        return ''
    shares = {other: 100 * count / sum(counts) for other, count in zip(stage['classes'], counts, strict=True)}
    own = shares.pop(name)
    others = [(other, share) for other, share in sorted(shares.items(), key=lambda item: -item[1])[:3] if share >= 5]
    return '; '.join([f'{own:.0f}', *(f'{other} {share:.0f}' for other, share in others)])


def _oracle(stage: dict[str, Any], name: str) -> str:
    own, oracle = stage['iou'][name], stage['oracle'] and stage['oracle']['iou'][name]
    return '' if oracle is None else f'{own:.1f} / {oracle:.1f}'


def _classifier(stage: dict[str, Any], name: str) -> str:
    rows = stage['classifier']
    return f'{rows["bias"][name]:.2f} / {rows["norm"][name]:.3g}' if rows else ''


def _attention(stage: dict[str, Any], name: str) -> str:
    values = (stage['attention'] or {}).get(name, [])
    return ' '.join('–' if value is None else f'{value:.3g}' for value in values)


def _pseudo_labels(stage: dict[str, Any], name: str) -> str:
    values = stage['pseudo_labels'] and stage['pseudo_labels']['classes'].get(name)
    return ' / '.join('–' if value is None else f'{value:.1f}' for value in values.values()) if values else ''


CELLS = dict(
    confusion=_confusion, oracle=_oracle, classifier=_classifier, attention=_attention, pseudo_labels=_pseudo_labels
)

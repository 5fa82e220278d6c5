# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Findings: sentences computed from a diagnosis' figures, the largest effects first.

Every finding has an effect from 0 to 100, by which all are ordered: points of IoU or of a class's pixels; for
a bias, how far it moves even odds; for a row's norm, by how much it is longer; for attention, the distance as a share
of the largest that two distributions can have; for pseudo-labels, 100 minus their F1 score.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmseg_sats.engine.diagnosis.confusion import shares

Figures = Mapping[str, Any]
Finding = dict[str, Any]
LACKING = ('learning', 'confusion', 'oracle')  # parts that say what is not known, and where; the others, why
POINTS = 5.0  # of IoU or of a class's pixels, from which a change is told
ODDS, LONGER = 0.5, 1.25  # difference of biases, and ratio of norms
UNSURE = 20.0  # of pseudo-labels


def findings(stages: Sequence[Figures]) -> list[Finding]:
    """All findings: ``part``, ``stage``, ``class`` (None for all of them), ``effect`` and ``text``.

    Args:
        stages: as ``diagnose`` gives them, in order.
    """
    found = [
        finding
        for number, stage in enumerate(stages)
        for tell in (_confused, _lost, _rows, _moved, _mislabelled)
        for finding in tell(stage, stages[:number])
    ]
    return sorted(found, key=lambda finding: -finding['effect'])


def worth(stages: Sequence[Figures]) -> list[str]:
    """What all stages after the first were worth, as a sentence; none where it was not measured."""
    last = stages[-1]
    if not last['unchanged']:
        return []
    # A class that few images do not show has no IoU, unless a model predicts it.
    known = ([value for value in last[part].values() if value is not None] for part in ('iou', 'unchanged'))
    own, unchanged = (sum(values) / len(values) for values in known)
    return [
        f"After stage {last['stage']}, all classes together have {own:.1f} mIoU, and would have {unchanged:.1f} with "
        f'the model of stage 0 as it was: all learning since was worth {own - unchanged:+.1f}.'
    ]


def _finding(part: str, stage: Figures, name: str | None, effect: float, text: str) -> Finding:
    return {'part': part, 'stage': stage['stage'], 'class': name, 'effect': effect, 'text': text}


def _old(stage: Figures) -> list[str]:
    """The classes that the old model knows, background first; none in stage 0."""
    return [name for name in stage['classes'] if name not in stage['new_classes']] if stage['stage'] else []


def _directly_before(stage: Figures, earlier: Sequence[Figures]) -> Figures | None:
    return earlier[-1] if earlier and earlier[-1]['stage'] == stage['stage'] - 1 else None


def _confused(stage: Figures, earlier: Sequence[Figures]) -> Iterator[Finding]:
    classes, now = stage['classes'], shares(np.array(stage['confusion']))
    before, then = _directly_before(stage, earlier), None
    if before is not None:
        then = shares(np.array(before['confusion']))
    for row, name in enumerate(classes):
        for column, other in enumerate(classes):
            share = now[row, column]
            if row == column or not share >= POINTS:
                continue
            text = f"{share:.0f} % of {name}'s pixels are predicted as {other}"
            if name in stage['new_classes']:
                if share >= 50:
                    text = f"Stage {stage['stage']} hardly learned {name}: {text}{_though_separated(stage, name)}."
                    yield _finding('learning', stage, name, share, text)
                continue
            if other in stage['learned']:
                text += f", which stage {stage['learned'][other]} learned"
            gained = share
            if then is not None and row < len(then) and column < len(then) and not math.isnan(then[row, column]):
                gained -= then[row, column]
                text += f" ({then[row, column]:.0f} % after stage {before['stage']})"
            if gained >= POINTS:
                yield _finding('confusion', stage, name, gained, f"After stage {stage['stage']}, {text}.")


def _though_separated(stage: Figures, name: str) -> str:
    """What the oracle says of a class that the head does not know, if it knows it."""
    own, oracle = stage['iou'][name], (stage['oracle'] or {}).get('iou', {}).get(name)
    if own is None or oracle is None or oracle - own < 2 * POINTS:
        return ''
    return f', although the encoder separates it (ridge {oracle:.1f})'


def _lost(stage: Figures, earlier: Sequence[Figures]) -> Iterator[Finding]:
    if stage['oracle'] is None:
        return
    number, own, oracle = stage['stage'], stage['iou'], stage['oracle']['iou']
    for name in _old(stage):
        if own[name] is None:
            continue
        known = [past for past in earlier if past['oracle'] and past['iou'].get(name) is not None]
        best = max(known, key=lambda past: past['iou'][name], default=None)
        if best is None:
            if oracle[name] - own[name] >= 2 * POINTS:
                text = (
                    f"The encoder separates {name} after stage {number} (ridge {oracle[name]:.1f}) where the head does "
                    f'not ({own[name]:.1f}).'
                )
                yield _finding('oracle', stage, name, oracle[name] - own[name], text)
            continue
        was, could = best['iou'][name], best['oracle']['iou'][name]
        lost, gone = was - own[name], could - oracle[name]
        if lost < POINTS:
            continue
        since = f"after stage {best['stage']}"
        if 2 * gone < lost:
            text = (
                f'The encoder still separates {name} after stage {number} (ridge {oracle[name]:.1f}, {could:.1f} '
                f'{since}) where the head has lost it ({own[name]:.1f}, {was:.1f} {since}).'
            )
        else:
            text = (
                f'The encoder itself has lost {name} after stage {number}: the ridge oracle falls from {could:.1f} '
                f'{since} to {oracle[name]:.1f}, and the head from {was:.1f} to {own[name]:.1f}.'
            )
        yield _finding('oracle', stage, name, lost, text)


def _rows(stage: Figures, earlier: Sequence[Figures]) -> Iterator[Finding]:
    old = _old(stage)[1:]
    if stage['classifier'] is None or not old:
        return
    bias, norm = stage['classifier']['bias'], stage['classifier']['norm']
    usual, length = (sum(values[name] for name in old) / len(old) for values in (bias, norm))
    start = f"After stage {stage['stage']},"
    before = _directly_before(stage, earlier)
    if before is not None and before['classifier'] is not None:
        then = before['classifier']['bias']
        usually = sum(then[name] for name in old) / len(old)
        for name in _old(stage):
            change = bias[name] - usual - (then[name] - usually)
            if abs(change) >= ODDS:
                did = 'raised' if change > 0 else 'lowered'
                text = (
                    f"Stage {stage['stage']} {did} {name}'s bias by {abs(change):.2f} against the mean of the old "
                    f'classes, which {_odds(change)}.'
                )
                yield _finding('classifier', stage, name, _moved_odds(change), text)
    for name in stage['new_classes']:
        difference = bias[name] - usual
        if abs(difference) >= ODDS:
            text = (
                f"{start} {name}'s bias is {abs(difference):.2f} {'above' if difference > 0 else 'below'} the mean of "
                f'the old classes ({usual:.2f}), which {_odds(difference)}.'
            )
            yield _finding('classifier', stage, name, _moved_odds(difference), text)
        if length > 0 and not 1 / LONGER < norm[name] / length < LONGER:
            ratio = norm[name] / length
            text = f"{start} {name}'s row is {ratio:.2f} times as long as the mean of the old classes ({length:.3g})."
            yield _finding('classifier', stage, name, 100 * (1 - min(ratio, 1 / ratio) if ratio else 1), text)


def _odds(difference: float) -> str:
    return f"{'multiplies' if difference > 0 else 'divides'} its odds against them by {math.exp(abs(difference)):.3g}"


def _moved_odds(difference: float) -> float:
    """How far the difference of two biases moves even odds, from 0 to 100."""
    return 100 * math.tanh(abs(difference) / 2)


def _moved(stage: Figures, _: Sequence[Figures]) -> Iterator[Finding]:
    for name in _old(stage)[1:]:
        values = [value for value in (stage['attention'] or {}).get(name, []) if value is not None]
        mean = sum(values) / len(values) if values else 0.0
        if mean > 0:
            block = stage['attention'][name].index(max(values))
            text = (
                f"Stage {stage['stage']} moved what {name} attends to by {mean:.3g} on average over the blocks, most "
                f'in block {block + 1} ({max(values):.3g}).'
            )
            yield _finding('attention', stage, name, 100 * mean / math.sqrt(2), text)


def _mislabelled(stage: Figures, _: Sequence[Figures]) -> Iterator[Finding]:
    if stage['pseudo_labels'] is None:
        return
    start, figures = f"In stage {stage['stage']},", stage['pseudo_labels']
    if (figures['ignored'] or 0) >= UNSURE:
        text = f"{start} {figures['ignored']:.0f} % of the background pixels are too unsure for a pseudo-label."
        yield _finding('pseudo_labels', stage, None, figures['ignored'], text)
    for name, values in figures['classes'].items():
        precision, recall = values['precision'], values['recall']
        if recall is None:
            continue
        effect = 100 - (2 * precision * recall / (precision + recall) if precision and recall else 0)
        if effect >= UNSURE:
            text = f"{start} the pseudo-labels find {recall:.0f} % of {name}'s pixels, and "
            text += (
                f'never say {name}.'
                if precision is None
                else f'{precision:.0f} % of those that they call {name} are {name}.'
            )
            yield _finding('pseudo_labels', stage, name, effect, text)

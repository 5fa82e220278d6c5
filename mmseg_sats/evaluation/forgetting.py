# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Forgetting and averages of a whole run, computed from the results of its stages.

Everything is in percent. A class or a stage without a value is None, NaN or simply not there.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

_NAMED = 3  # classes that no evaluation pixel shows: more are counted only


def forgetting_per_class(
    ious: Sequence[Mapping[str, float | None]], foreground_learned_before_last: Sequence[str]
) -> dict[str, float]:
    """Best IoU at an earlier stage minus the IoU after the last stage.

    Args:
        ious: Per stage, in order, the IoU of each class by name.
        foreground_learned_before_last: The classes to look at: all learned before the last
            stage, without background.

    Returns:
        Percentage points lost by class; negative where the class ended better than it ever
        was. A class absent at every earlier stage, or at the end, is left out, and a run of
        a single stage gives an empty dict.
    """
    if not ious:
        return {}
    lost = {}
    for name in foreground_learned_before_last:
        earlier = _present(stage.get(name) for stage in ious[:-1])
        final = _present([ious[-1].get(name)])
        if earlier and final:
            lost[name] = max(earlier) - final[0]
    return lost


def forgetting(
    ious: Sequence[Mapping[str, float | None]], foreground_learned_before_last: Sequence[str]
) -> float | None:
    """Mean of :func:`forgetting_per_class`, or None where no class has a value.

    Args:
        ious: As for :func:`forgetting_per_class`.
        foreground_learned_before_last: As for :func:`forgetting_per_class`.

    Returns:
        Percentage points; None for a run of a single stage.
    """
    return _mean(forgetting_per_class(ious, foreground_learned_before_last).values())


def average_all(all_by_stage: Sequence[float | None]) -> float | None:
    """Mean over the stages, stage 0 included, of the mIoU over all classes.

    Args:
        all_by_stage: The mIoU over all seen classes after each stage.

    Returns:
        Percent; None where no stage has a value.
    """
    return _mean(_present(all_by_stage))


def counted(iou: Mapping[str, float | None]) -> str:
    """Over how many classes the mean of all goes, such as '11 of 12 (without background)'.

    Args:
        iou: The IoU of every seen class by name; a class without one is in no mean.

    Returns:
        Empty if the mean goes over all classes.
    """
    absent = [name for name, value in iou.items() if value is None]
    if not absent:
        return ''
    names = f' (without {", ".join(absent)})' if len(absent) <= _NAMED else ''
    return f'{len(iou) - len(absent)} of {len(iou)}{names}'


def _present(values: Iterable[float | None]) -> list[float]:
    """The values that are there: neither None nor NaN."""
    return [value for value in values if value is not None and not math.isnan(value)]


def _mean(values: Iterable[float]) -> float | None:
    """Mean, or None of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else None

"""How sure a score is: standard errors of tasks, and an interval for the drop between two models.

Both models answered the same rows, so rows are resampled in pairs: what makes a row hard for both cancels. Every task
is resampled on its own and weighs the same, as in the mean score. Row scores lie between 0 and 1, results are points.
"""

import math
from collections.abc import Sequence

import numpy

RESAMPLES = 2000
CONFIDENCE = 0.95


def standard_error(scores: Sequence[float]) -> float | None:
    """Of the mean score of a task, in points; None for a single row, which says nothing about its spread."""
    if len(scores) < 2:
        return None
    return 100 * float(numpy.std(scores, ddof=1)) / math.sqrt(len(scores))


def drop_interval(
    original: Sequence[Sequence[float]], other: Sequence[Sequence[float]], seed: int = 0
) -> list[float] | None:
    """Bounds of the mean drop over tasks, in points: percentiles of a paired bootstrap over each task's rows.

    original, other: a list of row scores for every task, in the same order. None without tasks. The same numbers give
    the same interval.
    """
    if not original:
        return None
    generator = numpy.random.default_rng(seed)
    drops = numpy.zeros(RESAMPLES)
    for ours, theirs in zip(original, other, strict=True):
        lost = numpy.asarray(ours, dtype=float) - numpy.asarray(theirs, dtype=float)
        drops += lost[generator.integers(0, len(lost), (RESAMPLES, len(lost)))].mean(1)
    edge = 100 * (1 - CONFIDENCE) / 2
    bounds = numpy.percentile(100 * drops / len(original), [edge, 100 - edge])
    return [float(bound) for bound in bounds]

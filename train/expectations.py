"""What a cut of the cache in bytes costs, as it was measured: converted and healed, and by quantising the original.

Read from docs/results/budget.json. Between measured cuts losses are read off linearly in the logarithm of the bytes
that stay; beyond them nothing is said.
"""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parents[1] / "docs" / "results" / "budget.json"
NEAR = 0.005  # cuts that differ by no more are the same
Point = tuple[float, str, float, float]  # reduction, name, change of perplexity, KL to the original in nats


@dataclass
class Expectation:
    """One side's loss at a cut: change of perplexity, KL in nats, and what it was read off."""

    perplexity: float
    kl: float
    name: str


def expected(reduction: float) -> dict[str, Any]:
    """Of a cut in bytes: `converted` and `original` (quantised), each an `Expectation` or None where nothing was
    measured, and `advice`, a sentence."""
    points = measured_points()
    converted = at_cut([each for each in points if each[1] == "converted"], reduction)
    methods = {name.partition("-")[0] for _, name, _, _ in points} - {"converted"}
    found = [at_cut([p for p in points if p[1].startswith(f"{method}-")], reduction) for method in sorted(methods)]
    original = min((each for each in found if each), key=lambda each: each.kl, default=None)
    return {"converted": converted, "original": original, "advice": advice(converted, original)}


def advice(converted: Expectation | None, original: Expectation | None) -> str:
    """What to do at a cut, by the KL to the original."""
    if original is None:
        return "convert" if converted else "not measured"
    if converted is None:
        return f"quantise the original: {original.name}; converting was not measured there"
    return "convert" if converted.kl < original.kl else f"quantise the original: {original.name}"


def measured_points() -> list[Point]:
    """Every point whose KL was measured; none where the file is missing, as in an installed package."""
    if not MEASURED.exists():
        return []
    rows = [row for row in json.loads(MEASURED.read_text())["rows"] if row["kl_divergence"] is not None]
    return sorted(
        (row["reduction"], row["name"], row["perplexity"] / row["original_perplexity"] - 1, row["kl_divergence"])
        for row in rows
    )


def at_cut(points: list[Point], reduction: float) -> Expectation | None:
    """One method's loss at a cut, as measured there or between two that were; None elsewhere."""
    for one, other in pairwise(points):
        if one[0] <= reduction <= other[0]:
            span = math.log((1 - other[0]) / (1 - one[0]))
            share = math.log((1 - reduction) / (1 - one[0])) / span if span else 0.0
            perplexity, kl = (one[2] + share * (other[2] - one[2]), one[3] + share * (other[3] - one[3]))
            return Expectation(perplexity, kl, one[1] if share < 0.5 else other[1])
    near = [point for point in points if abs(point[0] - reduction) <= NEAR]
    return Expectation(near[0][2], near[0][3], near[0][1]) if near else None

"""What a cut of the cache in bytes costs, as it was measured: converted and healed, and by quantising the original.

Read from docs/results/frontier.json, which `python -m eval.sweep` wrote (its `sweep.json`). Between measured cuts
losses are read off linearly in the logarithm of the bytes that stay; beyond them nothing is said.
"""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parents[1] / "docs" / "results" / "frontier.json"
Point = tuple[float, str, float, float]  # reduction, name, change of perplexity, KL to the original in nats


@dataclass
class Expectation:
    """One side's loss at a cut: change of perplexity, KL in nats, and what it was read off."""

    perplexity: float
    kl: float
    name: str


def expected(reduction: float) -> dict[str, Any]:
    """Of a cut in bytes: `converted` and `original` (quantised), each an `Expectation` or None where nothing that small
    was measured, and `advice`, a sentence."""
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
    """Every measured point; none where the file is missing, as in an installed package."""
    if not MEASURED.exists():
        return []
    found: dict[tuple[str, float], Point] = {}
    for point in json.loads(MEASURED.read_text())["points"]:
        text = next(name.split("/")[1] for name in point if name.startswith("kl/"))
        whole, size = point[f"perplexity/{text}/original"], point["cache_bytes_per_token/original"]
        names = [name.rpartition("/")[2] for name in point if name.startswith(f"kl/{text}/")]
        for name in names:
            if name == "converted" or name.startswith("healed-"):
                continue
            shown = "converted" if name == "healed" else name
            cut = 1 - point[f"cache_bytes_per_token/{name}"] / size
            losses = point[f"perplexity/{text}/{name}"] / whole - 1, point[f"kl/{text}/{name}"]
            found[shown, round(cut, 4)] = (cut, shown, *losses)
    return sorted(found.values())


def at_cut(points: list[Point], reduction: float) -> Expectation | None:
    """One method's loss at a cut: of the smallest cut measured that is as large, or between two."""
    for one, other in pairwise(points):
        if one[0] <= reduction <= other[0]:
            span = math.log((1 - other[0]) / (1 - one[0]))
            share = math.log((1 - reduction) / (1 - one[0])) / span if span else 0.0
            perplexity, kl = (one[2] + share * (other[2] - one[2]), one[3] + share * (other[3] - one[3]))
            return Expectation(perplexity, kl, one[1] if share < 0.5 else other[1])
    larger = [point for point in points if point[0] >= reduction - 0.002]
    return Expectation(larger[0][2], larger[0][3], larger[0][1]) if larger else None

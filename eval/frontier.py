"""Loss against bytes: a converted model beside what the original loses at the same bytes with a quantised cache.

Works on what reports hold (`results.json`). Bytes are those a token, numbers that are not quantised counted in 16 bits.
No torch in here.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from eval.tables import MISSING, number, percent

METRICS = {"kl_divergence": "KL", "perplexity": "perplexity"}
NEARLY = 0.02  # bytes that differ by no more than this share are the same
ALIKE = 0.01  # losses too

Results = dict[str, Any]


@dataclass
class Rival:
    """The best quantised original for a model's bytes: its loss there, and the baselines that was read off."""

    value: float
    names: tuple[str, ...]


def method(name: str) -> str:
    """`kivi` of `kivi-4`."""
    return name.partition("-")[0]


def lines_of(results: Results, metric: str, text: str) -> dict[str, list[tuple[float, float, str]]]:
    """Bytes a token, loss and name of a method's baselines, the smallest first, by method; the original ends each."""
    values, cache = results.get(metric, {}).get(text, {}), results["cache"]
    whole_loss = 0.0 if metric == "kl_divergence" else values.get("original")
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for name in results.get("baselines", ()):
        lines.setdefault(method(name), []).append((cache[name]["bytes_per_token_16_bit"], values.get(name), name))
    original: Any = (cache["original"]["bytes_per_token_16_bit"], whole_loss, "original")
    found = {kind: [each for each in [*line, original] if is_point(each)] for kind, line in lines.items()}
    return {kind: sorted(line) for kind, line in found.items() if any(each[2] != "original" for each in line)}


def is_point(each: tuple[float | None, float | None, str]) -> bool:
    return all(value is not None and math.isfinite(value) for value in each[:2])


def rival(results: Results, model: str, metric: str, text: str) -> Rival | None:
    """The least loss that a quantised original has in a model's bytes: between two baselines of one method linear in
    the logarithm of the bytes, or that of a smaller one. None where no baseline is so small."""
    held = results["cache"][model]["bytes_per_token_16_bit"]
    if not held:
        return None
    found = []
    for line in lines_of(results, metric, text).values():
        found += [Rival(loss, (name,)) for size, loss, name in line if size <= held * (1 + NEARLY)]
        for (small, lower, first), (large, upper, second) in pairwise(line):
            if small < held < large:
                share = math.log(held / small) / math.log(large / small)
                found.append(Rival(lower + share * (upper - lower), (first, second)))
    return min(found, key=lambda each: each.value, default=None)


def verdicts(results: Results, model: str = "healed") -> dict[str, dict[str, Any]]:
    """By metric: the model's loss on the first text, the rival's at its bytes, and who is ahead. Empty without both."""
    text, found = next(iter(results["perplexity"])), {}
    for metric in METRICS:
        own = results.get(metric, {}).get(text, {}).get(model)
        other = rival(results, model, metric, text)
        if own is not None and other is not None:
            level = math.isclose(own, other.value, rel_tol=ALIKE)
            outcome = "level" if level else "ahead" if own < other.value else "behind"
            found[metric] = {"model": own, "rival": other.value, "baselines": list(other.names), "outcome": outcome}
    return found


def sentence(results: Results, model: str = "healed") -> str | None:
    """Who is ahead at equal bytes, said plainly; None where no baseline or no bytes were measured."""
    if not results.get("baselines") or not results["cache"][model]["bytes_per_token_16_bit"]:
        return None
    text, found = next(iter(results["perplexity"])), verdicts(results, model)
    if not found:
        return beyond(results, model, text)
    outcomes = {each["outcome"] for each in found.values()}
    cut = percent(results["kv_cache_reduction"][model])
    if len(outcomes) == 1:
        said = f"{outcome_words(outcomes.pop())} the quantised original"
    else:
        whom = ("the quantised original", "it")
        parts = [
            f"{outcome_words(each['outcome'])} {other} in {METRICS[metric]}"
            for other, (metric, each) in zip(whom, found.items(), strict=True)
        ]
        said = " and ".join(parts)
    figures = [
        f"{METRICS[metric]} {loss(each['model'])} against {loss(each['rival'])} ({from_words(each['baselines'])})"
        for metric, each in found.items()
    ]
    return f"At {cut} fewer bytes a token the {model} model is **{said}**, on {text}: {', '.join(figures)}."


def beyond(results: Results, model: str, text: str) -> str:
    """Of a model that is smaller than every baseline: how it stands against the smallest."""
    cut = results["kv_cache_reduction"]
    smallest = max(results["baselines"], key=lambda name: cut[name])
    pairs = {
        metric: [results.get(metric, {}).get(text, {}).get(name) for name in (model, smallest)] for metric in METRICS
    }
    figures = [f"{METRICS[metric]} {loss(own)} against {loss(other)}" for metric, (own, other) in pairs.items() if own]
    return (
        f"No quantised original measured is as small as the {model} model: {smallest} saves {percent(cut[smallest])} "
        f"of the bytes, the {model} model {percent(cut[model])}; on {text}: {', '.join(figures)}."
    )


def outcome_words(outcome: str) -> str:
    return {"ahead": "ahead of", "behind": "behind", "level": "level with"}[outcome]


def from_words(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"between {names[0]} and {names[1]}"


def loss(value: float | None) -> str:
    return MISSING if value is None else number(value, 3 if abs(value) < 10 else 1)

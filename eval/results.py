"""From the scores of all models to what is reported: averages, drops, cache reduction. No torch in here.

Scores are points from 0 to 100. A score that is missing stays missing (None) in everything made from it.
"""

import math
from collections.abc import Iterable
from typing import Any

from eval.uncertainty import drop_interval, standard_error

MODELS = ("original", "converted", "healed")
CODED = "{}-{}bit"  # name of a model whose latent cache is kept in so many bits
Scores = dict[str, Any]  # what eval/score.py returns for one model


def mean_score(tasks: dict[str, Any], names: Iterable[str] | None = None) -> float | None:
    """Average over tasks, each of the same weight."""
    values = [tasks[name]["score"] for name in (tasks if names is None else names)]
    return sum(values) / len(values) if values else None


def common_tasks(models: dict[str, Scores]) -> list[str]:
    """Tasks that every model has a score for; ValueError if they saw different inputs."""
    first, *others = models.values()
    names = [name for name in first["tasks"] if all(name in other["tasks"] for other in others)]
    for name in names:
        versions = {(scores["tasks"][name]["inputs"], scores["tasks"][name]["version"]) for scores in models.values()}
        if len(versions) > 1:
            raise ValueError(
                f"task '{name}': the models were scored on different inputs or versions of the task; "
                "run `make evaluate` again with force=true"
            )
    return names


def check_alike(models: dict[str, Scores]) -> None:
    """ValueError if the models ran in different dtypes or read different texts: their scores do not compare."""
    dtypes = {name: scores["dtype"] for name, scores in models.items()}
    if len(set(dtypes.values())) > 1:
        shown = ", ".join(f"{name} in {dtype}" for name, dtype in dtypes.items())
        raise ValueError(
            f"scores do not compare: {shown}. `native` and `auto` may mean another dtype on another machine: give "
            "eval.dtype=float32, bfloat16 or float16, and run `make evaluate` again with force=true"
        )
    for text in models["original"]["perplexity"]:
        found = [scores["perplexity"][text]["inputs"] for scores in models.values() if text in scores["perplexity"]]
        if len(set(found)) > 1:
            raise ValueError(
                f"perplexity of '{text}': the models read different windows; run `make evaluate` again with force=true"
            )


def bytes_16_bit(scores: Scores, reading: dict[str, int]) -> int:
    """Of a reading, bytes with all numbers in 16 bits; ValueError for one of an earlier version that has no such."""
    if "bytes_16_bit" in reading:
        return reading["bytes_16_bit"]
    if scores["dtype"] == "float32":
        raise ValueError(
            "the cache was measured in float32 by an earlier version, which cannot be compared with 16 bits; run "
            "`make evaluate` again with force=true"
        )
    return reading["bytes"]


def cache_figures(scores: Scores) -> dict[str, Any]:
    """Measured bytes of a model's cache over all batches of all tasks; per token a layer, and per token.

    `mean_context`: cached tokens of a sequence, on average. Few-bit caches keep some tokens whole, so bytes per token
    hold at this context.
    """
    tasks = scores["tasks"].values()
    readings = [task["cache"] for task in tasks]
    held, positions = (sum(reading[key] for reading in readings) for key in ("bytes", "positions"))
    counted = sum(bytes_16_bit(scores, reading) for reading in readings)
    layers = readings[0]["layers"] if readings else 0
    return {
        "dtype": scores["dtype"],
        "layers": layers,
        "bytes": held,
        "bytes_16_bit": counted,
        "positions": positions,
        "mean_context": positions / sum(task["rows"] for task in tasks) if positions else None,
        "bytes_per_token_16_bit": counted / positions if positions else None,
        "bytes_per_token": held / positions if positions else None,
        "bytes_per_token_per_layer": held / positions / layers if positions else None,
        "largest_batch_bytes": max((reading["largest_batch_bytes"] for reading in readings), default=None),
    }


def drop(original: float | None, score: float | None) -> dict[str, float | None]:
    """Points lost, and their share of the original's score in percent; negative is a gain."""
    if original is None or score is None:
        return {"points": None, "percent": None}
    return {"points": original - score, "percent": 100 * (original - score) / original if original else None}


def drop_bounds(original: Scores, other: Scores, names: list[str]) -> list[float] | None:
    """Interval of the mean drop over these tasks; None for scores of a version that kept no rows."""
    first, second = ([model["tasks"][name].get("row_scores") for name in names] for model in (original, other))
    if None in first + second:
        return None
    return drop_interval(first, second)


def reduction(original: dict[str, Any], other: dict[str, Any]) -> float | None:
    """1 - measured bytes a token of `other` over the original's, the numbers of both counted in 16 bits."""
    base, held = (each["bytes_per_token_16_bit"] for each in (original, other))
    return None if not base or held is None else 1 - held / base


def benchmark_scores(models: dict[str, Scores]) -> dict[str, Any]:
    """Score and standard error of every benchmark and their average, by model; None where a model was not scored."""
    first = models["original"].get("benchmarks", {})
    found = {
        name: {model: scores.get("benchmarks", {}).get(name) for model, scores in models.items()} for name in first
    }
    for name, rows in found.items():
        if len({row["inputs"] for row in rows.values() if row}) > 1:
            raise ValueError(f"benchmark '{name}': the models were scored on different questions; give force=true")
    if found:
        by_model = {model: [rows[model] for rows in found.values()] for model in models}
        found["average"] = {model: average(rows) if all(rows) else None for model, rows in by_model.items()}
    return found


def average(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean score of benchmarks and its standard error."""
    error = math.hypot(*(row["stderr"] for row in rows)) / len(rows)
    return {"score": sum(row["score"] for row in rows) / len(rows), "stderr": error}


def by_text(models: dict[str, Scores], texts: list[str], key: str) -> dict[str, dict[str, float | None]]:
    """A figure of every text by model; None where a model has none, as the original has no distance to itself."""
    return {
        text: {model: scores["perplexity"].get(text, {}).get(key) for model, scores in models.items()} for text in texts
    }


def needle_scores(models: dict[str, Scores]) -> dict[str, list[list[float]]]:
    """Depth, share of the longest prompt and score (0 to 1) of every pass key, by model."""
    return {
        model: [[*cell, score] for cell, score in zip(task["cells"], task["row_scores"], strict=True)]
        for model, scores in models.items()
        if (task := scores["tasks"]["passkey"]).get("cells")
    }


def compare(models: dict[str, Scores]) -> dict[str, Any]:
    """The comparison of `models` (original first) that reports and sweeps are made from."""
    check_alike(models)
    names = common_tasks(models)
    scores = {model: mean_score(found["tasks"], names) for model, found in models.items()}
    caches = {model: cache_figures(found) for model, found in models.items()}
    others = [model for model in models if model != "original"]
    texts = list(models["original"]["perplexity"])
    return {
        "kv_cache_reduction": {model: reduction(caches["original"], caches[model]) for model in others},
        "score": scores,
        "score_drop": {
            model: drop(scores["original"], scores[model])
            | {"interval": drop_bounds(models["original"], models[model], names)}
            for model in others
        },
        "perplexity": by_text(models, texts, "value"),
        "kl_divergence": by_text(models, texts, "kl_divergence"),
        "top1_agreement": by_text(models, texts, "top1_agreement"),
        "perplexity_tokens": {text: models["original"]["perplexity"][text]["tokens"] for text in texts},
        "cache": caches,
        "tasks": {
            name: {
                "rows": models["original"]["tasks"][name]["rows"],
                "truncated": models["original"]["tasks"][name]["truncated"],
                "version": models["original"]["tasks"][name]["version"],
                "inputs": models["original"]["tasks"][name]["inputs"],
                "score": {model: found["tasks"][name]["score"] for model, found in models.items()},
                "stderr": {
                    model: standard_error(found["tasks"][name].get("row_scores", [])) for model, found in models.items()
                },
                "drop": {
                    model: drop(models["original"]["tasks"][name]["score"], models[model]["tasks"][name]["score"])
                    for model in others
                },
            }
            for name in names
        },
        "benchmarks": benchmark_scores(models),
        "needle": needle_scores(models) if "passkey" in names else {},
        "not_compared": sorted({name for found in models.values() for name in found["tasks"]} - set(names)),
    }

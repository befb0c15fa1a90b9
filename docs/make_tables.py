"""Write the README's tables from the JSON in docs/results/, between the markers that name them.

    python docs/make_tables.py           rewrites README.md
    python docs/make_tables.py --check   exit code 1 if README.md and docs/results/ disagree
    python docs/make_tables.py --take outputs/MODEL/POINT/report
                                         first takes a run's report over as docs/results/default_run.*

No figure stands in the README that is not in one of these files.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def number(value: float | None) -> str:
    if value is None:
        return "missing"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def where(provenance: dict[str, Any]) -> str:
    machine, versions = provenance["hardware"], provenance["versions"]
    device = ", ".join(machine["gpus"]) if machine.get("gpus") else f"{machine['cores']} CPU cores, no GPU"
    libraries = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return f"commit {provenance['commit']}, {device}, {libraries}"


def default_run() -> str:
    """The embedded default: cache, perplexity and score of original, converted and healed model."""
    run = load("default_run")
    texts, tasks = list(run["perplexity"]), len(run["tasks"])
    rows = []
    for name, cache in run["cache"].items():
        cut = run["kv_cache_reduction"].get(name)
        score = run["score"][name]
        rows.append(
            [
                name,
                f"{cache['bytes_per_token']:,.0f}",
                "" if cut is None else f"{-100 * cut:.2f} %",
                *(number(run["perplexity"][text][name]) for text in texts),
                "missing" if score is None else f"{score:.1f}",
            ]
        )
    head = ["", "cache bytes a token", "cache", *(f"perplexity, {text}" for text in texts), f"{tasks} tasks, 0-100"]
    minutes = run["stages"]["finetune"]["seconds"] / 60
    total = sum(stage["seconds"] for stage in run["stages"].values()) / 60
    tokens = run["healing"]["validation"][-1]["tokens"]
    note = (
        f"{run['model']} ({run['dtype']}), healed on {tokens:,} tokens in {minutes:.0f} minutes, all stages in "
        f"{total:.0f}; {where(run['provenance'])}. `docs/results/default_run.json`"
    )
    return table(head, rows) + "\n\n" + note


def training_free() -> str:
    """The published method without healing, against the figures of its authors' code."""
    study = load("training_free")
    rows = [
        [
            row["name"],
            f"{row['rope_dim']} + {row['kv_lora_rank']}" if "rope_dim" in row else "",
            number(row["perplexity"]),
            number(row["reference"]) if row.get("reference") else "",
            f"{100 * row['against_reference']:+.1f} %" if "against_reference" in row else "",
        ]
        for row in study["rows"]
    ]
    note = (
        f"{study['model']}, first {study['text']['tokens']:,} tokens of WikiText-2's test text, float32; "
        f"{where(study['provenance'])}. `docs/results/training_free.json`"
    )
    return table(["", "R + r", "perplexity", "authors' code", "off"], rows) + "\n\n" + note


def methods() -> str:
    """Methods without healing at equal cache, and what each ingredient adds."""
    study = load("methods")
    rows = [
        [
            row["name"],
            f"{row['rope_dim']} + {row['kv_lora_rank']}" if "rope_dim" in row else "",
            f"{-100 * row['reduction']:.2f} %" if "reduction" in row else "",
            number(row["perplexity"]),
        ]
        for row in study["rows"]
    ]
    looked = study["calibration"]
    note = (
        f"{study['model']}, first {study['text']['tokens']:,} tokens of WikiText-2's test text, float32; calibrated "
        f"on {looked['tokens']:,} tokens of {len(looked['files'])} corpora; {where(study['provenance'])}. "
        "`docs/results/methods.json`"
    )
    return table(["", "R + r", "cache", "perplexity"], rows) + "\n\n" + note


def bench() -> str:
    """Decoding against the original model."""
    found = load("bench")
    setting = found["bench"]
    rows = [
        [name, f"{row['speed_against_original']:.2f}x", f"{row['cache_against_original']:.4f}x"]
        for name, row in found["variants"].items()
    ]
    note = (
        f"batch {setting['batch_size']}, {setting['context']:,} cached tokens, {setting['dtype']}; "
        f"{where(found['provenance'])}. `docs/results/bench.json`"
    )
    return table(["decode", "tokens/s", "cache bytes"], rows) + "\n\n" + note


TABLES: dict[str, Callable[[], str]] = {
    "default_run": default_run,
    "methods": methods,
    "training_free": training_free,
    "bench": bench,
}


def filled(text: str) -> str:
    """The text with every marked block made anew; ValueError for a table without a block."""
    for name, make in TABLES.items():
        block = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
        if not block.search(text):
            raise ValueError(f"README.md has no block <!-- {name} --> … <!-- /{name} -->")
        made = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text = block.sub(made.replace("\\", r"\\"), text)
    return text


def take(report: Path) -> None:
    """Copy a run's results and picture, without the folders of the machine it ran on."""
    text = re.sub(r"(?<![\w.:])/(?:[\w.-]+/)+", "", (report / "results.json").read_text())
    (RESULTS / "default_run.json").write_text(json.dumps(json.loads(text), indent=1) + "\n")
    shutil.copy(report / "reduction_vs_drop.png", RESULTS / "default_run.png")


if __name__ == "__main__":
    if "--take" in sys.argv:
        take(Path(sys.argv[sys.argv.index("--take") + 1]))
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = filled(before)
    if "--check" in sys.argv:
        sys.exit(after != before)
    readme.write_text(after)

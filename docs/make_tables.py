"""Write the documents' tables from the JSON in docs/results/, between the markers that name them.

    python docs/make_tables.py           rewrites README.md, docs/families.md and docs/scaling.md
    python docs/make_tables.py --check   exit code 1 if one of them and docs/results/ disagree
    python docs/make_tables.py --take outputs/MODEL/POINT/report
                                         first takes a run's report over as docs/results/default_run.*

No figure stands in these that is not in one of these files.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from eval.healing import times_fewer  # noqa: E402
from eval.markdown import with_error  # noqa: E402
from eval.results import MODELS  # noqa: E402

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
    device = f"{machine['cores']} CPU cores{' with bfloat16' if machine.get('bfloat16') else ''}, no GPU"
    device = ", ".join(machine["gpus"]) if machine.get("gpus") else device
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
                # Windows need no cache: a coded one has no perplexity of them.
                *("" if name not in MODELS else number(run["perplexity"][text][name]) for text in texts),
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


def study_note(study: dict[str, Any], file: str) -> str:
    looked = study["calibration"]
    return (
        f"{study['model']}, first {study['text']['tokens']:,} tokens of WikiText-2's test text, float32; calibrated "
        f"on {looked['tokens']:,} tokens of {len(looked['files'])} corpora; {where(study['provenance'])}. "
        f"`docs/results/{file}.json`"
    )


def words(name: str) -> str:
    return name.replace("mha2mla_2_norm", "mha2mla, 2-norm").replace("_", " ")


def methods() -> str:
    """Methods without healing: a row a method, a column a cache size."""
    study = load("methods")
    original, *rows = study["rows"]
    cuts = list(dict.fromkeys(row["reduction"] for row in rows))
    cells: dict[str, list[str]] = {"original": [number(original["perplexity"]), *[""] * len(cuts)]}
    for row in rows:
        cells.setdefault(row["name"], [""]).append(number(row["perplexity"]))
    more = load("steps")
    longer = {row["reduction"]: number(row["perplexity"]) for row in more["rows"][1:]}
    cells[more["rows"][1]["name"]] = ["", *(longer.get(cut, "") for cut in cuts)]
    head = ["", "whole cache", *(f"{-100 * cut:g} %" for cut in cuts)]
    note = (
        study_note(study, "methods")
        + f" The last row: commit {more['provenance']['commit']}, `docs/results/steps.json`"
    )
    return table(head, [[words(name), *values] for name, values in cells.items()]) + "\n\n" + note


def healing(name: str = "healing") -> str:
    """Perplexity of one text before and after healing."""
    found = load(name)
    rows = [
        [
            row["name"],
            f"{-100 * row['reduction']:.2f} %",
            row["loss"],
            row["trainable"],
            f"{row['learning_rate']:g}",
            f"{row['global_batch_size']} x {row['sequence_length']:,}",
            f"{row['tokens']:,}",
            number(row["curve"][0][1]),
            number(row["curve"][-1][1]),
            times_fewer(row["saved"]) if row["saved"] else "",
        ]
        for row in found["runs"]
    ]
    head = ["", "cache", "loss", "trained", "rate", "tokens a step", "tokens", "converted", "healed", "fewer tokens"]
    note = (
        "SmolLM2-135M-Instruct, WikiText-2 as above. Fewer tokens: how many times as many the published "
        "method took to the same perplexity, where that saves most, calibration text counted on both sides (>=: it "
        f"never came so far); {where(found['provenance'])}. `docs/results/{name}.json`"
    )
    return table(head, rows) + "\n\n" + note


def healing_long() -> str:
    return healing("healing_long")


def healing_losses() -> str:
    """What is trained, by what loss."""
    found = load("healing_losses")
    rows = [
        [
            row["loss"],
            row["trainable"],
            f"{row['learning_rate']:g}",
            *(number(text) for _, text, _ in row["curve"]),
        ]
        for row in found["runs"]
    ]
    first = found["runs"][0]
    head = ["loss", "trained", "rate", *(f"{tokens:,}" for tokens, _, _ in first["curve"])]
    note = (
        f"Perplexity of WikiText-2 by training tokens at {-100 * first['reduction']:.2f} %, "
        f"{first['global_batch_size']} x {first['sequence_length']} tokens a step; "
        f"{where(found['provenance'])}. `docs/results/healing_losses.json`"
    )
    return table(head, rows) + "\n\n" + note


def benchmark_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Head, rows and the questions of each benchmark."""
    names = list(next(iter(found["benchmarks"].values())))
    rows = [
        [model, *(with_error(row[name]["score"], row[name]["stderr"]) for name in names)]
        for model, row in found["benchmarks"].items()
    ]
    first = next(iter(found["benchmarks"].values()))
    questions = ", ".join(f"{name} {row['questions']:,}" for name, row in first.items() if "questions" in row)
    return ["", *names], rows, questions


def benchmarks_default() -> str:
    """The six benchmarks of the default run."""
    found = load("benchmarks_default")
    head, rows, questions = benchmark_table(found)
    note = f"Questions: {questions}; {found['dtype']}; {where(found['provenance'])}. "
    note += "`docs/results/benchmarks_default.json`"
    return table(head, rows) + "\n\n" + note


def benchmarks() -> str:
    """The six benchmarks of original and healed models, and the paper's."""
    found = load("benchmarks")
    head, rows, questions = benchmark_table(found)
    published = load("published")
    for model, scores in published["averages"].items():
        for cut in ("original", "-68.75", "-87.5"):
            cells = published["tasks"][model].get(cut, {})
            label = f"paper: {model}" + ("" if cut == "original" else f", {cut} %, {scores['tokens']}")
            shown = [f"{cells[name]:.1f}" if name in cells else "" for name in head[1:-1]]
            rows.append([label, *shown, f"{scores[cut]:.1f}"])
    note = (
        "SmolLM2-135M-Instruct, percent, no examples, by likelihood (`eval/benchmarks.py`), ± a standard error; "
        f"questions: {questions}; {found['dtype']}; {where(found['provenance'])}. `docs/results/benchmarks.json` "
        "Paper: MHA2MLA, arXiv 2502.14837, table 1, another model of the size on another harness, which is comparable "
        "in its drops alone. `docs/results/published.json`"
    )
    return table(head, rows) + "\n\n" + note


def ingredients() -> str:
    """What each ingredient of `best` is worth."""
    study = load("ingredients")
    rows = [[words(row["name"]), number(row["perplexity"])] for row in study["rows"][1:]]
    head = [f"{-100 * study['rows'][1]['reduction']:g} %", "perplexity"]
    return table(head, rows) + "\n\n" + study_note(study, "ingredients")


def cache_bits() -> str:
    """Perplexity of decoding through caches in few bits."""
    found = load("cache_bits")
    whole, *coded = found["rows"]
    rows = [["16", "16", "", "", f"{whole['bytes_per_token']:,.0f}", f"{-100 * whole['reduction']:.2f} %", ""]]
    for row in coded:
        ranges = "by channel" if row["calibrated"] else "by token"
        ranges = f"transformers' {row['stock']}" if row.get("stock") else ranges
        ranges = "control: one for all channels" if row.get("control") else ranges
        cells = [str(row["bits"]), str(row["rope_bits"]), ranges]
        cells += ["yes" if row["rotated"] else "", f"{row['bytes_per_token']:,.0f}", f"{-100 * row['reduction']:.2f} %"]
        rows.append([*cells, f"{100 * (row['against_whole'] - 1):+.1f} %"])
    kept = next(row["tokens_kept_whole"] for row in coded if row["tokens_kept_whole"])
    head = ["latent bits", "rotated key", "ranges", "turned", "bytes a token", "cache", "perplexity"]
    note = (
        f"{found['text']['tokens']:,} tokens of WikiText-2's test text, whole cache {number(whole['perplexity'])}; "
        f"{kept} tokens a sequence stay whole, not in the bytes, but for transformers'; ranges by channel from "
        f"{found['calibration_tokens']:,} tokens of other text; {where(found['provenance'])}. "
        "`docs/results/cache_bits.json`"
    )
    return table(head, rows) + "\n\n" + note


def positions() -> str:
    """Perplexity by position in long documents, as ratios to the original."""
    found = load("positions")
    names = list(found["perplexity"])
    base = found["perplexity"][names[0]]
    rows = [[names[0], *map(number, base)]]
    for name in names[1:]:
        ratios = [value / other for value, other in zip(found["perplexity"][name], base, strict=True)]
        rows.append([name, *(f"{ratio:.2f}x" for ratio in ratios)])
    head = ["tokens", *(f"{first:,}-{last:,}" for first, last in found["positions"])]
    note = (
        f"{found['documents']} documents of {found['length']:,} tokens; {where(found['provenance'])}. "
        "`docs/results/positions.json`"
    )
    return table(head, rows) + "\n\n" + note


def train_bench() -> str:
    """A training step of every loss against cross-entropy."""
    found = load("train_bench")
    rows = [
        [name, f"{row['seconds_per_step']:.2f}", f"{row['time_against_ce']:.2f}x", f"{row['memory_against_ce']:.2f}x"]
        for name, row in found["losses"].items()
    ]
    sequences, length = found["tokens"]
    note = (
        f"{found['model']}, {sequences} x {length} tokens, {found['trainable']} trained, {found['mixed_precision']}; "
        f"{where(found['provenance'])}. `docs/results/train_bench.json`"
    )
    return table(["loss", "seconds a step", "time", "memory"], rows) + "\n\n" + note


def bench() -> str:
    """Decoding against the original model."""
    found = load("bench")
    place, setting = found["grid"][0], found["bench"]
    whole = place["variants"]["absorbed"]["seconds_per_step"]
    rows = [
        [
            name,
            f"{row['speed_against_original']:.2f}x",
            f"{row['seconds_per_step'] / whole:.2f}x",
            f"{row['cache_against_original']:.4f}x",
            f"{row['step_memory_bytes'] / 2**30:.2f}",
        ]
        for name, row in place["variants"].items()
    ]
    note = (
        f"batch {place['batch']}, {place['context']:,} cached tokens, {setting['dtype']}; GiB: weights, cache and what "
        f"a step takes beside them; {where(found['provenance'])}. `docs/results/bench.json`"
    )
    head = ["decode", "tokens/s", "a step, against absorbed", "cache bytes", "GiB"]
    return table(head, rows) + "\n\n" + note


def minilongbench() -> str:
    """LongBench's tasks on MiniLongBench's rows, whole and coded caches."""
    found = load("minilongbench")
    models = list(found["score"])

    rows = [
        [name, str(task["rows"]), *(with_error(task["score"][model], task["stderr"][model]) for model in models)]
        for name, task in found["tasks"].items()
    ]
    count = sum(task["rows"] for task in found["tasks"].values())
    rows.append([f"mean of {len(found['tasks'])}", str(count), *(f"{found['score'][model]:.1f}" for model in models)])
    rows.append(["cache", "", "", *(f"-{100 * found['kv_cache_reduction'][model]:.2f} %" for model in models[1:])])
    drops = (found["score_drop"][model] for model in models[1:])
    shown = [f"{each['points']:.1f} ({each['interval'][0]:.1f} to {each['interval'][1]:.1f})" for each in drops]
    rows.append(["drop (95 %)", "", "", *shown])
    cut = sum(task["truncated"] for task in found["tasks"].values())
    note = (
        f"MiniLongBench ({count} rows of LongBench), prompts of up to {found['window']:,} tokens, {cut} of them cut in "
        f"the middle, {'with' if found['chat_template'] else 'without'} the chat template, {found['dtype']}; healed "
        f"on {found['healing_tokens']:,} tokens, ranges by token; "
        f"{where(found['provenance'])}. `docs/results/minilongbench.json`"
    )
    return table(["", "rows", *models], rows) + "\n\n" + note


def families() -> str:
    """What works for which family: yes where every test of it passed."""
    found = load("families")
    rows, columns = [], ["exact at full budget", "absorbed decode", "generate", "checkpoint", "quantised cache"]
    columns += ["healing", "layer by layer", "native export", "vLLM form"]
    for name, shown in sorted(found["families"].items()):
        cells = []
        for column in columns:
            counts = shown.get(column, {})
            cells.append("fails" if counts.get("failed") else next(iter(counts), ""))
        rows.append([name, *cells])
    note = f"From the outcomes of the tests that show it; {where(found['provenance'])}. `docs/results/families.json`"
    return table(["", *columns], rows) + "\n\n" + note


def span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def scaling() -> str:
    found, rows = load("scaling"), []
    for row in found["rows"]:
        whole, need = row["conversion"], row["healing"]
        rows.append(
            [
                row["model"],
                str(row["gpus"]),
                f"{whole['whole_gib']:,.1f} GiB",
                f"{whole['streamed_gib']:,.1f} GiB",
                span(whole["seconds"]),
                f"{row['tokens'] / 1e9:g} B",
                f"{need['gib']:,.1f} GiB",
                span(need["seconds"]),
            ]
        )
    head = ["", "GPUs", "convert, whole", "layer by layer", "time", "healing tokens", "a GPU holds", "time"]
    return table(head, rows) + f"\n\n{found['machine']}, {found['provenance']['commit']}. `docs/results/scaling.json`"


def scaling_measured() -> str:
    """What was measured beside what the formula says of it."""
    rows = [
        [row["what"], row["measured"], row["formula"], f"{row['ratio']:.2f}"]
        for row in load("scaling_measured")["rows"]
    ]
    return table(["", "measured", "formula", "formula / measured"], rows) + "\n\n`docs/results/scaling_measured.json`"


TABLES: dict[str, Callable[[], str]] = {
    "default_run": default_run,
    "methods": methods,
    "ingredients": ingredients,
    "healing": healing,
    "healing_losses": healing_losses,
    "healing_long": healing_long,
    "benchmarks": benchmarks,
    "benchmarks_default": benchmarks_default,
    "minilongbench": minilongbench,
    "cache_bits": cache_bits,
    "positions": positions,
    "training_free": training_free,
    "bench": bench,
    "train_bench": train_bench,
}


DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": TABLES,
    "docs/families.md": {"families": families},
    "docs/scaling.md": {"scaling": scaling, "scaling_measured": scaling_measured},
}


def filled(text: str, document: str = "README.md") -> str:
    """The text with every marked block made anew; ValueError for a table without a block."""
    for name, make in DOCUMENTS[document].items():
        block = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
        if not block.search(text):
            raise ValueError(f"{document} has no block <!-- {name} --> … <!-- /{name} -->")
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
    disagree = False
    for document in DOCUMENTS:
        before = (ROOT / document).read_text()
        after = filled(before, document)
        disagree |= after != before
        if "--check" not in sys.argv:
            (ROOT / document).write_text(after)
    sys.exit(disagree and "--check" in sys.argv)

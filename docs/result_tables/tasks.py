"""Tables of what models answer: the default run, benchmarks, LongBench."""

from typing import Any

from eval.markdown import with_error
from result_tables.common import load, number, table, where


def default_run() -> str:
    """The embedded default: cache, perplexity and score of original, converted and healed model."""
    run = load("default_run")
    texts, tasks = list(run["perplexity"]), len(run["tasks"])
    divergences = [run["kl_divergence"][text] for text in texts] if "kl_divergence" in run else []
    rows = []
    for name, cache in run["cache"].items():
        cut = run["kv_cache_reduction"].get(name)
        score = run["score"][name]
        rows.append(
            [
                name,
                f"{cache['bytes_per_token']:,.0f}",
                "" if cut is None else f"{-100 * cut:.2f} %",
                # Runs of earlier versions have no perplexity through a quantised cache, and no KL at all.
                *("" if (value := run["perplexity"][text].get(name)) is None else number(value) for text in texts),
                *("" if (value := row.get(name)) is None else f"{value:.3f}" for row in divergences),
                "missing" if score is None else f"{score:.1f}",
            ]
        )
    losses = [f"perplexity, {text}" for text in texts] + [f"KL, {text}" for text in texts if divergences]
    head = ["", "cache bytes a token", "cache", *losses, f"{tasks} tasks, 0-100"]
    minutes = run["stages"]["finetune"]["seconds"] / 60
    total = sum(stage["seconds"] for stage in run["stages"].values()) / 60
    tokens = run["healing"]["validation"][-1]["tokens"]
    note = (
        f"{run['model']} ({run['dtype']}), healed on {tokens:,} tokens in {minutes:.0f} minutes, all stages in "
        f"{total:.0f}; cache against the original's 16 bits at {context(run):,.0f} tokens of context on average; "
        f"{where(run['provenance'])}. `docs/results/default_run.json`"
    )
    return table(head, rows) + "\n\n" + note


def context(run: dict[str, Any]) -> float:
    """Cached tokens of a sequence, on average over all rows of all tasks."""
    rows: int = sum(task["rows"] for task in run["tasks"].values())
    return float(run["cache"]["original"]["positions"]) / rows


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


def minilongbench(file: str = "minilongbench") -> str:
    """LongBench's tasks on MiniLongBench's rows, whole and coded caches."""
    found = load(file)
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
        f"on {found['healing_tokens']:,} tokens of {found['healing_text']}, ranges by token; "
        f"{where(found['provenance'])}. `docs/results/{file}.json`"
    )
    return table(["", "rows", *models], rows) + "\n\n" + note


def minilongbench_chat() -> str:
    return minilongbench("minilongbench_chat")

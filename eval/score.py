"""All scores of one model: perplexities and tasks, each written to disk as soon as it is complete.

A folder per model holds `<task>.jsonl` (every output with its score) and, written after it, `<task>.json`;
perplexities are `perplexity-<text>.json`, benchmarks `benchmark-<name>.json`. A score whose file is there for these
very inputs is not computed again, and batches of a task wait in `<task>.part`, so a killed evaluation goes on with the
batch it was at.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import logging

from conf.progress import Progress
from conf.stage import write_json
from eval.benchmarks import Benchmarks
from eval.divergence import divergence
from eval.generate import CacheReading, NewCache, batches, generate, growing_cache
from eval.inputs import Inputs, TaskInputs, TextInputs
from eval.perplexity import perplexity
from eval.tasks import Task
from eval.variants import Variant
from mha2mla.memory import hand_back


def score_model(
    variant: Variant,
    inputs: Inputs,
    folder: Path,
    batch_size: int,
    device: str,
    original: Variant | None = None,
) -> dict[str, Any]:
    """Scores of a model on all inputs; loads it only if one is missing.

    original: what its texts are compared with, loaded beside it for them alone; None: the model is the original.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = [(text, folder / f"perplexity-{text.name}.json") for text in inputs.texts]
    tasks = [(each, folder / f"{each.task.name}.json") for each in inputs.tasks]
    suite = inputs.benchmarks
    benchmarks = [(each, folder / f"benchmark-{each}.json") for each in (suite.tasks if suite else ())]
    on = {"dtype": str(inputs.dtype).removeprefix("torch."), "device": device}
    open_texts = [(text, file) for text, file in texts if not is_done(file, text.digest, on=on)]
    open_tasks = [(each, file) for each, file in tasks if not is_done(file, each.digest, each.task.version, on)]
    open_benchmarks = [
        (each, file) for each, file in benchmarks if suite and not is_done(file, suite.digest(each), on=on)
    ]
    name, wanted = variant.name, len(open_texts) + len(open_tasks) + len(open_benchmarks)
    there = len(texts) + len(tasks) + len(benchmarks) - wanted
    if there:
        print(f"{name}: {there} scores are there already", flush=True)
    if wanted:
        print(f"{name}: loading {variant.path}", flush=True)
        logging.disable_progress_bar()
        model = variant.load()
        tokens = sum(text.tokens for text, _ in open_texts) + sum(each.tokens for each, _ in open_tasks)
        with Progress(name, tokens, "tokens") as progress:
            score_texts(model, variant, open_texts, original, progress, on)
            for each, file in open_tasks:
                outputs, new_cache = file.with_suffix(".jsonl"), variant.new_cache or growing_cache
                found = score_task(model, each, inputs, outputs, batch_size, progress, device, new_cache)
                write_json(file, found | on)
        for benchmark, file in open_benchmarks:
            assert suite is not None
            found = score_benchmark(variant, model, suite, benchmark, inputs.tokenizer, batch_size)
            write_json(file, found | on)
        del model
        hand_back(device)
    return {
        "path": variant.path,
        "revision": variant.revision,
        "cache_bits": variant.bits,
        **on,
        "chat_template": inputs.chat,
        "perplexity": {text.name: json.loads(file.read_text()) for text, file in texts},
        "tasks": {each.task.name: json.loads(file.read_text()) for each, file in tasks},
        "benchmarks": {each: json.loads(file.read_text()) for each, file in benchmarks},
    }


def is_done(file: Path, digest: str, version: str | None = None, on: dict[str, str] | None = None) -> bool:
    """Whether a score is there, made from these inputs with this version of the task, `on` this dtype and device."""
    if not file.exists():
        return False
    stored, wanted = json.loads(file.read_text()), {"inputs": digest, "version": version} | (on or {})
    return all(stored.get(name) == value for name, value in wanted.items())


def score_texts(
    model: Any,
    variant: Variant,
    texts: list[tuple[TextInputs, Path]],
    original: Variant | None,
    progress: Progress,
    on: dict[str, str],
) -> None:
    """Each text into its file; the original is in memory for as long as this takes."""
    reference = None
    if texts and original is not None:
        reference = model if variant.is_original else original.load()
    for text, file in texts:
        write_json(file, score_text(model, text, progress, reference, variant.new_cache) | on)
    del reference
    hand_back(model.device)


def score_text(
    model: Any,
    text: TextInputs,
    progress: Progress,
    original: Any = None,
    new_cache: NewCache | None = None,
) -> dict[str, Any]:
    """Perplexity and, where there is an original to compare with, KL divergence from it, on the same windows."""
    started, found = time.time(), {}
    if original is None:
        value = perplexity(model, text.windows, progress.advance)
        said = ""
    else:
        compared = divergence(original, model, text.windows, new_cache, progress.advance)
        value = compared.perplexity_converted
        found = {"kl_divergence": compared.kl_divergence, "top1_agreement": compared.top_token_agreement}
        said = f", KL to the original {compared.kl_divergence:.4f}"
    progress.line(f"perplexity {text.name} {value:.2f}{said} ({text.tokens} tokens)")
    return {
        "value": value,
        **found,
        "tokens": text.tokens,
        "windows": len(text.windows),
        "inputs": text.digest,
        "seconds": round(time.time() - started, 1),
    }


def score_task(
    model: Any,
    each: TaskInputs,
    inputs: Inputs,
    outputs: Path,
    batch_size: int,
    progress: Progress,
    device: str,
    new_cache: NewCache = growing_cache,
) -> dict[str, Any]:
    """Generate, score and keep every row of one task; batches that a killed run has finished are taken from it."""
    started, task, reading = time.time(), each.task, CacheReading()
    kept: list[dict[str, Any]] = [{} for _ in each.rows]
    partial, key = outputs.with_suffix(".part"), f"{each.digest} {task.version} {inputs.dtype} {device}"
    done = finished_batches(partial, key)
    for batch in batches([len(prompt.ids) for prompt in each.prompts], batch_size):
        found = done.get(tuple(batch))
        if found is None:
            found = score_batch(model, each, batch, inputs, new_cache, teller(progress, task))
            with partial.open("a") as stream:  # a line begins with its end: what a kill has cut off stays alone
                stream.write("\n" + json.dumps({"key": key, "batch": batch} | found))
        reading.join(CacheReading(**found["cache"]))
        for index, row in zip(batch, found["rows"], strict=True):
            kept[index] = row
        progress.advance(sum(len(each.prompts[index].ids) for index in batch))
    write_lines(outputs, kept)
    partial.unlink(missing_ok=True)
    score = 100 * sum(row["score"] for row in kept) / len(kept)
    progress.line(f"{task.name} {score:.1f} ({len(kept)} rows)")
    return {
        "score": score,
        "rows": len(kept),
        "row_scores": [row["score"] for row in kept],
        "cells": [[row["depth"], row["share"]] for row in kept if "depth" in row],
        "truncated": sum(row["truncated"] for row in kept),
        "version": task.version,
        "inputs": each.digest,
        "prompt_tokens": each.tokens,
        "cache": {
            "bytes": reading.bytes,
            "bytes_16_bit": reading.bytes_16_bit,
            "positions": reading.positions,
            "layers": reading.layers,
            "largest_batch_bytes": reading.largest,
        },
        "seconds": round(time.time() - started, 1),
    }


def teller(progress: Progress, task: Task) -> Callable[[int], None]:
    """Says at which token a batch is."""
    return lambda step: progress.advance(0, f"{task.name} at token {step} of {task.max_new_tokens}")


def score_batch(
    model: Any,
    each: TaskInputs,
    batch: list[int],
    inputs: Inputs,
    new_cache: NewCache,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Rows of these indices with output and score, and what the cache held for them."""
    task, reading = each.task, CacheReading()
    texts = generate(
        model,
        inputs.tokenizer,
        [each.prompts[index].ids for index in batch],
        task.max_new_tokens,
        inputs.stops,
        reading,
        first_line=task.first_line and not task.newline_ends,
        newline_ends=task.newline_ends,
        new_cache=new_cache,
        on_step=on_step,
    )
    rows = []
    for index, text in zip(batch, texts, strict=True):
        row, prompt = each.rows[index], each.prompts[index]
        kept = {
            "_id": row["_id"],
            "prompt_tokens": len(prompt.ids),
            "truncated": prompt.truncated,
            "answers": row["answers"],
            "output": text,
            "score": task.score(row, text),
        }
        rows.append(kept | {name: row[name] for name in ("depth", "share") if name in row})
    return {"rows": rows, "cache": asdict(reading)}


def finished_batches(file: Path, key: str) -> dict[tuple[int, ...], dict[str, Any]]:
    """Batches of row indices that a killed run left in `file` for these inputs; half a line is none."""
    found = {}
    for text in file.read_text().split("\n") if file.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line["key"] == key:
            found[tuple(line["batch"])] = line
    return found


def score_benchmark(
    variant: Variant, model: Any, suite: Benchmarks, benchmark: str, tokenizer: Any, batch_size: int
) -> dict[str, Any]:
    """One benchmark through lm-eval, which shows its own bar."""
    started, name = time.time(), variant.name
    print(f"{name}: {benchmark}", flush=True)
    found = suite.score(benchmark, model, tokenizer, batch_size, variant.new_cache)
    seconds = round(time.time() - started, 1)
    print(f"{name}: {benchmark} {found['score']:.1f} ({found['questions']} questions) [{seconds:.0f} s]", flush=True)
    return found | {"inputs": suite.digest(benchmark), "seconds": seconds}


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(file)

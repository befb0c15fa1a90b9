"""All scores of one model: perplexities and tasks, each written to disk as soon as it is complete.

A folder per model holds `<task>.jsonl` (every output with its score) and, written after it, `<task>.json`;
perplexities are `perplexity-<text>.json`, benchmarks `benchmark-<name>.json`. A score whose file is there for these
very inputs is not computed again, and batches of a task wait in `<task>.part`, so a killed evaluation goes on with the
batch it was at.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from conf.checkpoint import load_model
from conf.progress import Progress
from conf.stage import write_json
from eval.benchmarks import Benchmarks
from eval.generate import CacheReading, NewCache, batches, coded_cache, generate, growing_cache
from eval.inputs import Inputs, TaskInputs, TextInputs
from eval.perplexity import perplexity
from eval.tasks import Task


def score_model(
    name: str,
    path: str,
    revision: str | None,
    inputs: Inputs,
    folder: Path,
    batch_size: int,
    device: str,
    cache_bits: int | None = None,
) -> dict[str, Any]:
    """Scores of the model at `path` (folder or hub id) on all inputs; loads it only if one is missing.

    With `cache_bits` its latent cache is coded, and perplexities and benchmarks, which need no cache, are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = [(text, folder / f"perplexity-{text.name}.json") for text in inputs.texts if cache_bits is None]
    tasks = [(each, folder / f"{each.task.name}.json") for each in inputs.tasks]
    suite = inputs.benchmarks if cache_bits is None else None
    benchmarks = [(each, folder / f"benchmark-{each}.json") for each in (suite.tasks if suite else ())]
    on = {"dtype": str(inputs.dtype).removeprefix("torch."), "device": device}
    open_texts = [(text, file) for text, file in texts if not is_done(file, text.digest, on=on)]
    open_tasks = [(each, file) for each, file in tasks if not is_done(file, each.digest, each.task.version, on)]
    open_benchmarks = [
        (each, file) for each, file in benchmarks if suite and not is_done(file, suite.digest(each), on=on)
    ]
    wanted = len(open_texts) + len(open_tasks) + len(open_benchmarks)
    there = len(texts) + len(tasks) + len(benchmarks) - wanted
    if there:
        print(f"{name}: {there} scores are there already", flush=True)
    if wanted:
        print(f"{name}: loading {path}", flush=True)
        logging.disable_progress_bar()
        model = load_model(path, inputs.dtype, revision=revision, device=device)
        new_cache = growing_cache if cache_bits is None else coded_cache(cache_bits)
        tokens = sum(text.tokens for text, _ in open_texts) + sum(each.tokens for each, _ in open_tasks)
        with Progress(name, tokens, "tokens") as progress:
            for text, file in open_texts:
                write_json(file, score_text(model, text, progress) | on)
            for each, file in open_tasks:
                outputs = file.with_suffix(".jsonl")
                found = score_task(model, each, inputs, outputs, batch_size, progress, device, new_cache)
                write_json(file, found | on)
        for benchmark, file in open_benchmarks:
            assert suite is not None
            write_json(file, score_benchmark(name, model, suite, benchmark, inputs.tokenizer, batch_size) | on)
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return {
        "path": path,
        "revision": revision,
        "cache_bits": cache_bits,
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


def score_text(model: Any, text: TextInputs, progress: Progress) -> dict[str, Any]:
    started = time.time()
    value = perplexity(model, text.windows, progress.advance)
    progress.line(f"perplexity {text.name} {value:.2f} ({text.tokens} tokens)")
    return {
        "value": value,
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
    name: str, model: Any, suite: Benchmarks, benchmark: str, tokenizer: Any, batch_size: int
) -> dict[str, Any]:
    """One benchmark through lm-eval, which shows its own bar."""
    started = time.time()
    print(f"{name}: {benchmark}", flush=True)
    found = suite.score(benchmark, model, tokenizer, batch_size)
    seconds = round(time.time() - started, 1)
    print(f"{name}: {benchmark} {found['score']:.1f} ({found['questions']} questions) [{seconds:.0f} s]", flush=True)
    return found | {"inputs": suite.digest(benchmark), "seconds": seconds}


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(file)

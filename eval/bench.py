"""Decode speed, memory and measured cache of the converted model against its original, as ratios of one run.

    python -m eval.bench 'bench.contexts=[2048,8192]' 'bench.batch_sizes=[1,8]'

At every context and batch, all variants hold as many cached tokens and take turns at decoding, so that a busy machine
slows them alike: the original attention, latent attention that expands its cache at every step, latent attention that
attends the latent itself, and that with its latent in few bits, with ranges by token or calibrated by channel. Writes
`outputs/<model>/bench.json` and `bench.png`.

`cache_against_original` counts a number that is not coded as 2 bytes on both sides, whatever dtype the bench runs in;
`cache_bytes` are those that were held.

Memory is weights, cache and what a prompt or a step takes beside them. `bandwidth_share` is what weights and cache
alone, read once a step, are of the bytes that a plain copy moves in that time.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import hydra
import torch
import transformers
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from conf.checkpoint import NOT_OURS, load_model
from conf.devices import pick_device
from conf.errors import StageError, stage_main
from conf.evaluation import BenchConfig
from conf.models import local_model
from conf.plan import plain, write_result
from conf.precision import torch_dtype
from conf.progress import Progress
from conf.schema import Config
from conf.stage import hardware, provenance
from conf.timing import seconds_of
from eval.bench_picture import draw_bench
from eval.decoding import Decoding, NewCache, Variant, compiled, copy_bandwidth, largest_batch, own_cache
from eval.generate import ROPE_BITS
from mha2mla import (
    ConversionOptions,
    QuantizedLatentCache,
    calibrate_ranges,
    collect_statistics,
    convert,
)
from mha2mla.memory import hand_back

GIB = 2**30
OUT_OF_MEMORY = "out of memory"
CUDA_ONLY = ("compile", "largest_batch")


def measure(config: Config) -> dict[str, Any]:
    """The variants at every context and batch of `config.bench`."""
    bench = config.bench
    device = torch.device(pick_device(config.launch.device))
    on_gpu = device.type == "cuda"
    for name in CUDA_ONLY:
        if getattr(bench, name) and not on_gpu:
            raise ValueError(f"bench.{name}=true needs a GPU; torch uses none here (launch.device)")
    dtype = torch_dtype(bench.dtype, not on_gpu, stored="auto")
    print("bench: loading the original, and converting it", flush=True)
    original: Any = load_model(local_model(config), dtype, NOT_OURS, config.model.revision, device)
    # Any text will do: how fast a step is does not depend on what the weights are.
    calibration = collect_statistics(original, [torch.arange(64)[None]])
    made: list[Any] = []
    seconds = seconds_of(
        # Few-bit caches are variants of their own.
        lambda: made.extend(convert(original, ConversionOptions.from_config(config.mla).by_rank(), calibration)),
        device,
    )
    converted, report = made
    variants = variants_of(original, converted, bench)
    bandwidth = copy_bandwidth(device)
    sizes = [(context, batch) for context in bench.contexts for batch in bench.batch_sizes]
    with Progress("bench", len(sizes) * (bench.rounds + 1), "rounds") as progress:
        grid = [
            {
                "context": context,
                "batch": batch,
                "variants": point(variants, bench, context, batch, bandwidth, progress),
            }
            for context, batch in sizes
        ]
    result = {
        "bench": plain(bench) | {"dtype": str(original.dtype).removeprefix("torch."), **place_of(device)},
        "model": config.model.name,
        "cache_numbers": report.cache_size,
        "conversion_seconds": seconds,  # the closed form, without calibration and reconstruction
        "copy_bytes_per_second": bandwidth,
        "grid": grid,
    }
    if bench.largest_batch:
        result["largest_batch"] = {
            context: {
                variant.name: largest_batch(variant, context, limit(bench, context))
                for variant in variants
                if not variant.expands and variant.call is variant.model
            }
            for context in bench.contexts
        }
    return result | {"provenance": provenance()}


def place_of(device: torch.device) -> dict[str, Any]:
    """What a speed holds for beside the dtype."""
    if device.type == "cuda":
        return {"device": "cuda", "chip": torch.cuda.get_device_name(device)}
    return {"device": device.type, "chip": hardware().get("cpu"), "threads": torch.get_num_threads()}


def variants_of(original: Any, converted: Any, bench: BenchConfig) -> list[Variant]:
    """All ways to decode that the bench compares, the original first."""
    caches = {model: own_cache(model, bench.static_cache) for model in (original, converted)}
    found = [
        Variant("original", original, caches[original]),
        Variant("expanded", converted, caches[converted], expands=True),
        Variant("absorbed", converted, caches[converted]),
    ]
    if bench.compile:
        found += [compiled(variant) for variant in found if not variant.expands]
    for bits in bench.cache_bits:
        text = torch.randint(converted.config.vocab_size, (1, 512), device=found[0].device)
        ranges = calibrate_ranges(converted, [text], bits, ROPE_BITS)
        found += [
            Variant(f"{bits} bits", converted, coded(converted, bits)),
            Variant(f"{bits} bits, calibrated", converted, coded(converted, bits, ranges)),
        ]
    return found


def coded(model: Any, bits: int, ranges: Any = None) -> NewCache:
    return lambda limit: QuantizedLatentCache(model.config, bits, ROPE_BITS, ranges=ranges)


def limit(bench: BenchConfig, context: int) -> int:
    """Tokens that a cache must have room for."""
    return context + bench.steps * (bench.rounds + 1)


def point(
    variants: list[Variant], bench: BenchConfig, context: int, batch: int, bandwidth: float, progress: Progress
) -> dict[str, Any]:
    """All variants at one context and batch, one that failed as {"failed": why}."""
    running: dict[str, Decoding] = {}
    failed: dict[str, dict[str, str]] = {}

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; None where it fails: the other variants need not be lost with it."""
        try:
            return work()
        except RuntimeError as error:  # memory, kernels and compilers all raise kinds of it
            lacks_memory = isinstance(error, torch.OutOfMemoryError)
            reason = OUT_OF_MEMORY if lacks_memory else f"{type(error).__name__}: {str(error).strip()[:300]}"
            tqdm.write(f"bench: {name}: {reason}", file=sys.stderr)
            failed[name] = {"failed": reason}
            running.pop(name, None)
        hand_back(variants[0].device)
        return None

    torch.compiler.reset()  # every size has graphs of its own, of which only so many are kept
    for variant in variants:
        start = partial(Decoding, variant, batch, context, limit(bench, context), bench.prefill)
        started = attempt(variant.name, start)
        if started:
            running[variant.name] = started
    for turn in range(bench.rounds + 1):
        for name, each in list(running.items()):
            took = attempt(name, partial(each.steps, bench.steps, weigh=not turn))
            if turn and took is not None:  # the first turn warms up
                each.seconds.append(took)
        progress.advance(1)
    original = running.get("original")
    rows = failed | {name: row(each, original, bandwidth) for name, each in running.items()}
    running.clear()
    del original
    hand_back(variants[0].device)
    return {variant.name: rows[variant.name] for variant in variants}


def row(each: Decoding, original: Decoding | None, bandwidth: float) -> dict[str, Any]:
    step = statistics.median(each.seconds)
    found = {
        "first_token_seconds": each.first_token_seconds,
        "seconds_per_step": step,
        "tokens_per_second": each.batch / step,
        "cache_bytes": each.cache_bytes,
        "cache_bytes_16_bit": each.cache_bytes_16_bit,
        "prompt_memory_bytes": each.prompt_memory,
        "step_memory_bytes": each.step_memory,
        "bandwidth_share": (each.variant.weight_bytes + each.cache_bytes) / step / bandwidth,
    }
    if original:
        found["speed_against_original"] = statistics.median(original.seconds) / step
        found["cache_against_original"] = each.cache_bytes_16_bit / original.cache_bytes_16_bit
    return found


def show(result: dict[str, Any]) -> None:
    bench = result["bench"]
    print(f"in {bench['dtype']} on {bench['device']}: {bench['chip']}" + threads(bench))
    for place in result["grid"]:
        setting = f"batch {place['batch']}, {place['context']:,} cached tokens, {bench['dtype']}"
        table = Table(title=f"decode: {setting}")
        for heading in ("", "first token", "tokens/s", "speed", "cache MiB", "cache", "GiB"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, found in place["variants"].items():
            table.add_row(name, *([escape(found["failed"].split(":")[0])] if "failed" in found else cells(found)))
        Console(width=80).print(table)
    for context, batches in result.get("largest_batch", {}).items():
        print(f"largest batch at {context:,} tokens: " + ", ".join(f"{name} {size}" for name, size in batches.items()))


def threads(bench: dict[str, Any]) -> str:
    return f", {bench['threads']} threads" if "threads" in bench else ""


def cells(found: dict[str, Any]) -> list[str]:
    first, memory = found["first_token_seconds"], found["prompt_memory_bytes"] or found["step_memory_bytes"]
    return [
        "" if first is None else f"{first:.2f} s",
        f"{found['tokens_per_second']:,.1f}",
        f"{found['speed_against_original']:.2f}x" if "speed_against_original" in found else "",
        f"{found['cache_bytes'] / 2**20:,.1f}",
        f"{found['cache_against_original']:.3f}x" if "cache_against_original" in found else "",
        "" if memory is None else f"{memory / GIB:.2f}",
    ]


@stage_main
def run(config: Config) -> None:
    result = measure(config)
    show(result)
    rows = [row for place in result["grid"] for row in place["variants"].values()]
    if all("failed" in row for row in rows):
        raise StageError("every variant failed; nothing was written")
    path = write_result(config, "bench", result)
    draw_bench(result, path.with_suffix(".png"))
    if any(row.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in rows):
        raise StageError(f"some variants failed, as said above and in {path}")


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    transformers.utils.logging.disable_progress_bar()
    run(cfg)


if __name__ == "__main__":
    main()

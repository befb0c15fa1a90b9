"""Decode speed and measured cache of the converted model against its original, as ratios of one run.

    python -m eval.bench bench.context=4096 bench.batch_size=4

Three variants step through the same number of cached tokens: the original attention, latent attention that expands
its cache at every step, and latent attention that attends the latent itself. The cache is filled with random
states, since a step takes as long whatever they are. Writes `outputs/<model>/bench.json`.
"""

import statistics
from typing import Any

import hydra
import torch
import transformers
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from tqdm import trange
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from conf.errors import stage_main
from conf.models import local_model
from conf.plan import plain, write_result
from conf.precision import torch_dtype
from conf.schema import BenchConfig, Config, Device
from conf.stage import provenance
from conf.timing import seconds_of
from eval.generate import ROPE_BITS
from mha2mla import ConversionOptions, QuantizedLatentCache, cache_bytes, collect_statistics, convert
from mha2mla.families import attention_layers
from mha2mla.modeling.attention_mla import MLAAttention


def filled_cache(model: Any, bench: BenchConfig, bits: int | None = None) -> Any:
    """A cache of `bench.context` random tokens, in the shapes that the model itself caches; with `bits` in codes."""
    limit = bench.context + bench.steps * (bench.rounds + 1)
    if bits is not None:
        cache: Any = QuantizedLatentCache(model.config, bits, ROPE_BITS)
    elif bench.static_cache:
        cache = StaticCache(config=model.config, max_cache_len=limit)
    else:
        cache = DynamicCache(config=model.config)
    config, parameter = model.config, next(model.parameters())
    for layer, attention in enumerate(attention_layers(model)):
        if isinstance(attention, MLAAttention):
            shapes = [(1, attention.kv_lora_rank), (1, attention.rope_dim)]
        else:
            shapes = [(config.num_key_value_heads, config.head_dim)] * 2
        states = [
            torch.randn(bench.batch_size, heads, bench.context, size, device=parameter.device).to(parameter.dtype)
            for heads, size in shapes
        ]
        cache.update(*states, layer)
    return cache


@torch.inference_mode()
def decode(model: Any, cache: Any, bench: BenchConfig) -> float:
    """Seconds for `bench.steps` decoding steps."""
    device = next(model.parameters()).device
    first = torch.ones(bench.batch_size, 1, dtype=torch.long, device=device)

    def steps() -> None:
        ids = first
        for _ in range(bench.steps):
            ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return seconds_of(steps, device)


def measure(config: Config) -> dict[str, Any]:
    """Seconds a step, tokens/s and cache bytes of every variant, and the ratios to the original."""
    bench = config.bench
    on_gpu = config.launch.device is not Device.cpu and torch.cuda.is_available()
    dtype = torch_dtype(bench.dtype, not on_gpu, stored="auto")
    original = AutoModelForCausalLM.from_pretrained(local_model(config), dtype=dtype)
    original = original.to("cuda" if on_gpu else "cpu").eval()
    # Any text will do: how fast a step is does not depend on what the weights are.
    calibration = collect_statistics(original, [torch.arange(64)[None]])
    converted, report = convert(original, ConversionOptions.from_config(config.mla), calibration)
    models = {"original": original, "expanded": converted, "absorbed": converted}
    caches = {name: filled_cache(model, bench) for name, model in models.items()}
    for bits in bench.cache_bits:
        name = f"absorbed, {bits} bits"
        models[name], caches[name] = converted, filled_cache(converted, bench, bits)
    held = {name: cache_bytes(cache) for name, cache in caches.items()}

    seconds: dict[str, list[float]] = {name: [] for name in models}
    chosen_by_shape = MLAAttention.absorbs
    for turn in trange(bench.rounds + 1, desc="bench", unit="round", disable=None):
        for name, model in models.items():
            if name != "original":
                MLAAttention.absorbs = lambda self, queries, name=name: name != "expanded"  # type: ignore[method-assign]
            took = decode(model, caches[name], bench)
            if turn:  # the first turn warms up
                seconds[name].append(took / bench.steps)
    MLAAttention.absorbs = chosen_by_shape  # type: ignore[method-assign]

    rows = {}
    for name in models:
        step = statistics.median(seconds[name])
        rows[name] = {
            "seconds_per_step": step,
            "tokens_per_second": bench.batch_size / step,
            "speed_against_original": statistics.median(seconds["original"]) / step,
            "cache_bytes": held[name],
            "cache_against_original": held[name] / held["original"],
        }
    absorbed_gain = rows["expanded"]["seconds_per_step"] / rows["absorbed"]["seconds_per_step"]
    return {
        "bench": plain(bench) | {"dtype": str(original.dtype).removeprefix("torch.")},
        "model": config.model.name,
        "cache_numbers": report.cache_size,
        "variants": rows,
        "absorbed_against_expanded": absorbed_gain,
        "provenance": provenance(),
    }


def show(result: dict[str, Any]) -> None:
    bench = result["bench"]
    cache = "static" if bench["static_cache"] else "dynamic"
    setting = f"batch {bench['batch_size']}, {bench['context']:,} cached tokens, {bench['dtype']}, {cache} cache"
    table = Table(title=f"decode: {setting}")
    for heading in ("", "tokens/s", "speed", "cache MiB", "cache"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in result["variants"].items():
        table.add_row(
            name,
            f"{row['tokens_per_second']:.1f}",
            f"{row['speed_against_original']:.2f}x",
            f"{row['cache_bytes'] / 2**20:.1f}",
            f"{row['cache_against_original']:.4f}x",
        )
    Console(width=80).print(table)


@stage_main
def run(config: Config) -> None:
    result = measure(config)
    show(result)
    write_result(config, "bench", result)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    transformers.utils.logging.disable_progress_bar()
    run(cfg)


if __name__ == "__main__":
    main()

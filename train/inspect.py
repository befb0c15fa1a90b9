"""What can be done with a model, from its configuration alone: no weights are loaded.

    python -m train.inspect HuggingFaceTB/SmolLM2-135M
    python -m train.inspect path/to/checkpoint --reductions 0.5 0.875 --json

Family, kind of attention, cache before and after, by rank alone and with a format, what that cost where it was measured
and where quantising the original costs less; the strategies that fit it and why others do not, which forms the
result can be exported in and which kernels serve it, and what conversion and healing need (train/resources.py).
"""

import argparse
import json
from dataclasses import asdict, fields
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from conf.errors import ends_in_one_line
from conf.models import PACKAGE, check_folder, package_gguf
from conf.naming import presets
from conf.pretrained import load_config, skeleton
from conf.schema import ModelConfig
from mha2mla import ConversionOptions, native, resolve_options, served
from mha2mla.convert import TABLES
from mha2mla.families import attention_layers, family_of, geometry_of
from mha2mla.target import chosen_layers, converted_config
from train.expectations import expected
from train.resources import H100, NO_BFLOAT16, TWO_CORES, conversion, count, healing

REDUCTIONS = (0.5, 0.6875, 0.75, 0.8125, 0.875, 0.9375)
BYTES = 2  # of a cached number
MACHINES = (TWO_CORES, NO_BFLOAT16, H100)


def inspect(path: str, reductions: list[float]) -> dict[str, Any]:
    """Everything that is printed, as plain data; ValueError for a model that cannot be converted."""
    if not all(0 < reduction < 1 for reduction in reductions):
        raise ValueError(f"--reductions {reductions}: cuts of the cache lie between 0 and 1")
    config = read_config(path)
    if path.startswith(PACKAGE):
        config.dtype = torch.float32  # what its file is unpacked to
    family, model = family_of(config), skeleton(path, config)
    geometry = geometry_of(config)
    kinds = {geometry.num_heads: "multi-head (MHA)", 1: "multi-query (MQA)"}
    attention, sizes = attention_layers(model), count(model)
    budgets = [budget(config, attention, reduction) for reduction in reductions]
    return {
        "model": path,
        "family": family.model_type,
        "attention": kinds.get(geometry.num_kv_heads, "grouped-query (GQA)"),
        "heads": [geometry.num_heads, geometry.num_kv_heads, geometry.head_dim],
        "norms": family.norms,
        "key_scales": geometry.key_scales,
        "rotary_dim": geometry.rotary_dim or geometry.head_dim,
        "rope": rope_of(config),
        "window": getattr(config, "sliding_window", None),
        "parameters": sizes.total,
        "layers": sizes.layers,
        "cache_bytes_per_token": BYTES * geometry.cache_size * sizes.layers,
        "budgets": budgets,
        "formats": [cache_format(config, reduction) for reduction in reductions],
        "strategies": strategies(config),
        "conversion": {each.name: conversion(config, sizes, 16384, 0, 1024, each, coded=True) for each in MACHINES},
        "healing": {
            "2 CPU cores, 65,536 tokens, attention": healing(sizes, 65536, 2, 512, TWO_CORES, trainable="attention"),
            "1 H100, 10 M tokens": healing(sizes, 1e7, 4, 2048, H100),
            "8 H100 sharded, 1 B tokens": healing(sizes, 1e9, 4, 2048, H100, 8, sharded=True, checkpointing=True),
        },
    }


def read_config(path: str) -> Any:
    path = ModelConfig(path=path).path
    check_folder("MODEL", path)
    if path.startswith(PACKAGE):
        file = package_gguf(path)
        return load_config(file.parent, gguf_file=file.name)
    return load_config(path)


def rope_of(config: Any) -> str:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {kind.get("rope_type") for kind in rope.values() if isinstance(kind, dict)} or {rope.get("rope_type")}
    return ", ".join(sorted(str(kind or "default") for kind in kinds))


def budget(config: Any, attention: list[Any], reduction: float) -> dict[str, Any]:
    """The sizes that a reduction of the cache gives with the default method, and what the result can become."""
    known = {item.name for item in fields(ConversionOptions)}
    found: dict[str, Any] = {"reduction": reduction}
    for method in ("best", "native"):
        preset = {key: value for key, value in presets()[method].items() if key in known}
        try:
            by_rank: dict[str, Any] = preset | {"bits": 16, "reduction": reduction}
            options = resolve_options(config, ConversionOptions(**by_rank))
        except ValueError as error:
            if method == "best":
                return found | {"impossible": str(error)}
            found["native"] = [str(error)]
            continue
        converted = converted_config(config, options, attention[chosen_layers(config, options)[0]])
        if method == "native":
            found["native"] = native.obstacles(converted)
            continue
        numbers = options.cached_rope_dim + (options.kv_lora_rank or 0) + geometry_of(config).key_scales
        found |= {
            "rope_dim": options.rope_dim,
            "kv_lora_rank": options.kv_lora_rank,
            "cache_bytes_per_token": BYTES * numbers * config.num_hidden_layers,
            "vllm": served.obstacles(converted),
            "kernels": kernels(options.kv_lora_rank or 0, options.rope_dim or 0),
        }
    return found


def cache_format(config: Any, reduction: float) -> dict[str, Any]:
    """Channels and bits that a cut in bytes leaves a cache with a format, and what such a cut cost where measured."""
    known = {item.name for item in fields(ConversionOptions)}
    preset = {key: value for key, value in presets()["best"].items() if key in known}
    asked: dict[str, Any] = preset | {"bits": "auto", "reduction": reduction}
    found: dict[str, Any] = {"reduction": reduction}
    try:
        options = resolve_options(config, ConversionOptions(**asked))
    except ValueError as error:
        return found | {"impossible": str(error)}
    channels = options.cached_rope_dim + (options.kv_lora_rank or 0)
    bits = options.channel_bits(geometry_of(config), channels) / channels
    measured = expected(reduction)
    advice = measured.pop("advice")
    losses = {name: asdict(each) if each else None for name, each in measured.items()}
    return found | {
        "rope": options.rope,
        "rope_dim": options.rope_dim,
        "kv_lora_rank": options.kv_lora_rank,
        "bits_per_channel": bits,
        "measured": losses,
        "advice": advice,
    }


def kernels(rank: int, rope: int) -> list[str]:
    """vLLM's latent kernels by r + R: the Triton one takes any sizes, those for DeepSeek's own sizes no others."""
    return ["Triton MLA", *(["FlashMLA", "CUTLASS MLA", "FlashInfer MLA"] if (rank, rope) == (512, 64) else [])]


def strategies(config: Any) -> dict[str, dict[str, str | None]]:
    """For every option and value, why it does not fit the model; None where it does."""
    found: dict[str, dict[str, str | None]] = {}
    for option, module in TABLES.items():
        found[option] = {}
        for value in module.STRATEGIES:
            chosen: dict[str, Any] = {option: value}
            if value in ("evenly-spaced", "rotation-cost"):
                chosen["rope_basis"] = "principal"
            elif value == "principal":
                chosen["partial_rope"] = "rotation-cost"
            try:
                resolved = resolve_options(config, ConversionOptions(**chosen))
                same = getattr(resolved, option) == value
                found[option][value] = None if same else f"{option}={value} becomes {getattr(resolved, option)}"
            except ValueError as error:
                found[option][value] = str(error)
    return found


def show(found: dict[str, Any], console: Console) -> None:
    heads, groups, size = found["heads"]
    print_pairs(
        console,
        {
            "model": f"{found['model']}: {found['family']}, {found['parameters'] / 1e9:.3g} B parameters",
            "attention": f"{found['attention']}: {heads} query heads, {groups} key/value heads of {size}"
            + (f", normed over {'every head' if found['norms'] == 'head' else 'all heads'}" if found["norms"] else ""),
            "rotation": f"{found['rotary_dim']} of {size} numbers a head, {found['rope']}"
            + (f"; window of {found['window']} tokens" if found["window"] else ""),
            "cache": f"{found['cache_bytes_per_token']:,} bytes a token in {found['layers']} layers (16 bits)",
        },
    )
    table = Table(box=None, pad_edge=False)
    for column in ("cut", "R + r", "bytes a token", "native", "vLLM", "kernels"):
        table.add_column(column, justify="left" if column == "kernels" else "right")
    for row in found["budgets"]:
        cut = f"-{100 * row['reduction']:.2f} %"
        if "impossible" in row:
            table.add_row(cut, "none", "", "", "", "")
            continue
        yes = ["no" if row[form] else "yes" for form in ("native", "vllm")]
        sizes = f"{row['rope_dim']} + {row['kv_lora_rank']}" + (f" + {found['key_scales']}" if found["norms"] else "")
        table.add_row(cut, sizes, f"{row['cache_bytes_per_token']:,}", *yes, ", ".join(row["kernels"]))
    console.print()
    console.print(table)
    print_formats(found["formats"], console)
    reasons = {form: row[form] for form in ("native", "vllm") for row in found["budgets"] if row.get(form)}
    impossible = {f"cut {row['reduction']}": row["impossible"] for row in found["budgets"] if "impossible" in row}
    refused = [why for values in found["strategies"].values() for why in values.values() if why]
    print_pairs(console, {f"not {name}": "; ".join(why) for name, why in reasons.items()} | impossible)
    for why in dict.fromkeys(refused):
        console.print(why, highlight=False, markup=False)
    console.print()
    for name, need in found["conversion"].items():
        text = (
            f"{need['whole_gib']:.1f} GiB whole, {need['streamed_gib']:.1f} layer by layer, {duration(need['seconds'])}"
        )
        print_pairs(console, {f"convert, {name}": text})
    for name, need in found["healing"].items():
        print_pairs(console, {f"heal, {name}": f"{need['gib']:.1f} GiB a process, {duration(need['seconds'])}"})


def print_formats(formats: list[dict[str, Any]], console: Console) -> None:
    """The same cuts in bytes with a cache format, and their measured losses."""
    table = Table(box=None, pad_edge=False)
    for column in ("cut in bytes", "rope", "R", "r", "bits", "healed", "quantised", "less KL"):
        table.add_column(column, justify="left" if column == "less KL" else "right")
    for row in formats:
        cut = f"-{100 * row['reduction']:.2f} %"
        if "impossible" in row:
            table.add_row(cut, "none", *[""] * 6)
            continue
        losses = [loss_words(row["measured"][side]) for side in ("converted", "original")]
        sizes = row["rope"], str(row["rope_dim"] or ""), str(row["kv_lora_rank"])
        advice = row["advice"].replace("quantise the original: ", "")
        table.add_row(cut, *sizes, f"{row['bits_per_channel']:.1f}", *losses, advice)
    console.print()
    console.print(table)
    console.print(
        "Perplexity and KL to the original as measured on SmolLM2-135M-Instruct (docs/results/budget.json): an order "
        "of magnitude for other models.",
        highlight=False,
    )


def loss_words(loss: dict[str, Any] | None) -> str:
    return "" if loss is None else f"{100 * loss['perplexity']:+.1f} %, {loss['kl']:.2f}"


def print_pairs(console: Console, pairs: dict[str, str]) -> None:
    for name, text in pairs.items():
        console.print(f"{name}: {text}", highlight=False, markup=False)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@ends_in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="hub id, checkpoint folder or package:NAME")
    parser.add_argument("--reductions", type=float, nargs="+", default=list(REDUCTIONS), help="cuts of the cache")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    options = parser.parse_args()
    found = inspect(options.model, options.reductions)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, Console())


if __name__ == "__main__":
    main()

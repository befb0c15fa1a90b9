"""What a latent cache in a few bits costs in perplexity and in bytes, token by token as in decoding.

    python -m eval.cache_bits outputs/MODEL/RUN/finetune --text wikitext2_test.txt --calibrate brown.jsonl.gz
        --output docs/results/cache_bits

Every window of the text is fed through the cache one token at a time, so each token is predicted from what the cache
hands out; all windows together are a batch. Writes OUTPUT.json: perplexity, bytes that a coded token takes in the cache
as measured, the number of tokens kept whole, which are not in the bytes, and the reduction against the original's
numbers in 16 bits. Numbers that are not coded count 2 bytes, whatever the machine holds them in; layers that were left
as they are count on neither side.

`--stock` measures transformers' own quantised caches on the same windows too, those whose packages are installed
(quanto: optimum-quanto, hqq: hqq). Their bytes are of all tokens, the latest kept whole included.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers import Cache, DynamicCache, QuantizedCache

from conf.checkpoint import load_model
from conf.errors import ends_in_one_line
from conf.precision import Dtype, torch_dtype
from conf.pretrained import load_tokenizer
from conf.progress import counted
from conf.schema import SourceConfig
from conf.stage import provenance, write_json
from data.skipped import Skipped, tell
from data.sources import list_parts, read_texts
from data.tokens import check_ids, plain_ids
from data.windows import text_windows
from mha2mla import QuantizedLatentCache, cache_bytes, calibrate_ranges, rotate_latents
from mha2mla.cache import storage_bytes
from mha2mla.families import latent_layers
from mha2mla.output_head import next_token_losses, perplexity_of
from mha2mla.quantization import Range
from mha2mla.quantized_cache import LayerRanges, QuantizedLatentLayer

# Bits of latent and rotated key, and whether ranges come from calibration (else from every token's groups).
SETTINGS = (
    (8, 8, False),
    (4, 8, False),
    (4, 8, True),
    (4, 4, True),
    (3, 4, True),
    (2, 4, True),
    (2, 2, True),
)


STOCK_BITS = 4  # of transformers' quanto and hqq caches


def stock_cache(backend: str, config: Any) -> Cache:
    """transformers' quantised cache: fp8 as it is, the others in 4 bits with groups that fit latent and rotated key."""
    if backend == "fp8":
        return QuantizedCache("fp8", config)
    group = math.gcd(config.kv_lora_rank, config.rope_dim)
    return QuantizedCache(backend, config, nbits=STOCK_BITS, q_group_size=group, residual_length=32)


def measure_stock(model: Any, windows: torch.Tensor, add: Callable[..., None]) -> None:
    """Adds a row for every backend that is installed and takes these sizes; what others say is printed."""
    for backend in ("fp8", "quanto", "hqq"):
        try:
            cache = stock_cache(backend, model.config)
            found = decoding_perplexity(model, windows, cache, backend)
        except (ImportError, ValueError, RuntimeError, AssertionError) as error:
            reason = "not installed" if isinstance(error, ImportError) else f"not measured: {error}"
            print(shorten(f"  {backend} {reason}", 80), flush=True)
            continue
        held = cache_bytes(cache, number_bytes=2) / (windows.shape[0] * (windows.shape[1] - 1))
        bits = 8 if backend == "fp8" else STOCK_BITS
        add(held, found, None, stock=backend, bits=bits, rope_bits=bits)


@torch.inference_mode()
def decoding_perplexity(model: Any, windows: torch.Tensor, cache: Cache, shown: str = "decode") -> float:
    """Perplexity of windows [N, T] whose tokens go through `cache` one by one."""
    total = torch.zeros((), dtype=torch.float64)
    ids = windows.to(model.device)
    for place in counted(range(ids.shape[1] - 1), shown, "tokens"):
        token, following = ids[:, place : place + 1], ids[:, place + 1 : place + 2]
        losses = next_token_losses(model, token, following, past_key_values=cache, use_cache=True)
        total += losses.double().sum().cpu()
    return perplexity_of(float(total) / (ids.shape[0] * (ids.shape[1] - 1)))


def bytes_a_token(cache: Cache) -> tuple[float, int]:
    """Bytes of a coded token over all latent layers, ranges stored with it counted; tokens a sequence kept whole."""
    layers: list[Any] = [layer for layer in cache.layers if isinstance(layer, QuantizedLatentLayer)]
    total = 0.0
    for layer in layers:
        buffers = [rows.buffer for store in layer.stores for rows in store.rows.values()]
        if any(buffer is None for buffer in buffers):
            raise ValueError("no token was coded: the windows must be longer than the first and latest tokens together")
        total += sum(storage_bytes(buffer, 2) / (buffer.shape[0] * buffer.shape[2]) for buffer in buffers)
    return total, layers[0].sinks[0].shape[2] + layers[0].recent[0].shape[2]


def calibration_text(files: list[str], tokenizer: Any, length: int, tokens: int) -> list[torch.Tensor]:
    """Sequences [1, length] of the first documents that are so long; ValueError if they are too few."""
    found: list[torch.Tensor] = []
    skipped = Skipped()
    for part in list_parts("--calibrate", SourceConfig(data_files=files), 0):
        for text in read_texts(part, skipped):
            ids = plain_ids(tokenizer, text[: 8 * length])
            if len(ids) >= length:
                found.append(torch.tensor(ids[:length])[None])
            if len(found) * length >= tokens:
                tell("cache_bits", {"--calibrate": skipped})
                return found
    raise ValueError(f"--calibrate: {len(found)} documents of {length} tokens found, {tokens // length} needed")


def measure(
    model: Any,
    windows: torch.Tensor,
    batches: list[torch.Tensor],
    original: int,
    on_row: Callable[[dict], None],
    stock: bool = False,
) -> list[dict[str, Any]]:
    """A row a setting, the whole cache first, then transformers' own if wanted. Turns the model's latents."""
    layers = len(latent_layers(model))
    numbers = sum(layer.cached_size for _, layer in latent_layers(model))
    whole = decoding_perplexity(model, windows, DynamicCache(), "whole")
    rows: list[dict[str, Any]] = []

    def add(held: float, found: float, kept: int | None, **settings: Any) -> None:
        row = {"calibrated": False, "rotated": False, **settings}
        row |= {"perplexity": found, "against_whole": found / whole, "bytes_per_token": held}
        rows.append(row | {"tokens_kept_whole": kept, "reduction": 1 - held / (2 * original * layers)})
        on_row(rows[-1])

    def add_coded(bits: int, rope_bits: int, ranges: list[LayerRanges] | None, **settings: Any) -> None:
        cache = QuantizedLatentCache(model.config, bits, rope_bits, ranges=ranges)
        found = decoding_perplexity(model, windows, cache, f"{bits} bits")
        held, kept = bytes_a_token(cache)
        add(held, found, kept, bits=bits, rope_bits=rope_bits, calibrated=ranges is not None, **settings)

    add(2.0 * numbers, whole, None, bits=16, rope_bits=16)
    if stock:
        measure_stock(model, windows, add)
    for rotated in (False, True):
        if rotated:
            rotate_latents(model)
        for bits, rope_bits, calibrated in SETTINGS:
            ranges = calibrate_ranges(model, batches, bits, rope_bits) if calibrated else None
            add_coded(bits, rope_bits, ranges, rotated=rotated)
        if not rotated:
            wrong = [one_range(layer, 4) for layer in calibrate_ranges(model, batches, 4, 8)]
            add_coded(4, 8, wrong, control=True)
    return rows


def original_numbers(config: Any, given: int | None) -> int:
    """Numbers that the original caches a token a layer, keys and values; ValueError if other ones are given."""
    numbers = 2 * int(config.num_key_value_heads) * int(config.head_dim)
    if given not in (None, numbers):
        raise ValueError(
            f"--original {given}: the model's original caches {numbers} numbers a token a layer (keys and values of "
            f"{config.num_key_value_heads} heads of {config.head_dim}); leave --original out"
        )
    return numbers


def one_range(ranges: LayerRanges, bits: int) -> LayerRanges:
    """The control: one range for all channels of the latent, which a few wide ones set."""
    span = ranges.latent
    low = span.low.min()
    high = (span.low + (2**bits - 1) * span.scale).max()
    latent = Range(low.expand_as(span.low), ((high - low) / (2**bits - 1)).expand_as(span.scale))
    return LayerRanges(latent, ranges.rope)


def show(row: dict[str, Any]) -> None:
    ranges = "calibrated" if row["calibrated"] else "by token" if row["bits"] < 16 else ""
    ranges = "one range" if row.get("control") else row.get("stock", ranges)
    change = "" if row["bits"] == 16 else f"{100 * (row['against_whole'] - 1):+.1f} %"
    print(
        f"{row['bits']:>4}{row['rope_bits']:>6}  {ranges:<12}{'rotated' if row['rotated'] else '':<9}"
        f"{row['bytes_per_token']:>9,.0f}{-100 * row['reduction']:>9.2f} %{row['perplexity']:>11,.2f}{change:>10}",
        flush=True,
    )


@ends_in_one_line()
def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a converted checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="plain text to measure perplexity on")
    parser.add_argument(
        "--calibrate", nargs="+", required=True, help="documents for ranges: JSON lines, Parquet or text"
    )
    parser.add_argument("--original", type=int, help="numbers the original caches a token a layer; default: by config")
    parser.add_argument("--stock", action="store_true", help="transformers' quantised caches too")
    parser.add_argument("--tokens", type=int, default=10240)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--output", type=Path, required=True, help="path of the JSON, without suffix")
    options = parser.parse_args()
    if not (options.model / "config.json").exists():
        parser.exit(1, f"error: no checkpoint in {options.model}\n")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch_dtype(Dtype.native, device == "cpu")
    model = load_model(options.model, dtype, device=device)
    if not hasattr(model.config, "kv_lora_rank"):
        parser.exit(1, f"error: {options.model} is not a converted model: it has no latent to keep in few bits\n")
    tokenizer = load_tokenizer(options.model)
    print(f"decoding in {str(dtype).removeprefix('torch.')} on {device}; bytes of a coded token, numbers in 16 bits")
    print("bits  rope  ranges               bytes a token      cut perplexity    change")
    try:
        original = original_numbers(model.config, options.original)
        windows = torch.stack(text_windows(tokenizer, options.text, options.length, options.tokens))
        batches = calibration_text(options.calibrate, tokenizer, 1024, 4096)
        check_ids("--text", windows, tokenizer, model.config)
        check_ids("--calibrate", batches, tokenizer, model.config)
        rows = measure(model, windows, batches, original, show, options.stock)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    result = {
        "rows": rows,
        "text": {"file": options.text.name, "tokens": windows.numel(), "sequence_length": options.length},
        "calibration_tokens": sum(batch.numel() for batch in batches),
        "original_numbers": original,
        "numbers": model.config.kv_lora_rank + model.config.rope_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "provenance": provenance(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output.with_suffix(".json"), result)


if __name__ == "__main__":
    main()

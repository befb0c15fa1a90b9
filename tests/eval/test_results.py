"""Reductions and comparisons that mean the same on every machine, and refusals of those that would not."""

from functools import cache
from typing import Any

import pytest
import torch

from eval.generate import CacheReading, Stops, coded_cache, generate, growing_cache
from eval.results import cache_figures, compare, reduction
from mha2mla import ConversionOptions, QuantizedLatentCache, cache_bytes, convert
from tests.eval.tiny import model, tokenizer

ROWS, PROMPT, NEW = 2, 90, 12
CONTEXT = PROMPT + NEW - 1  # the last token is generated and not cached


@cache
def measured(dtype: torch.dtype, bits: int | None, converted: bool = True) -> dict[str, Any]:
    """What eval/score.py keeps of one task of a model in this dtype, its outputs of a fixed length."""
    tiny = convert(model(), ConversionOptions(rope_dim=8, kv_lora_rank=12))[0] if converted else model()
    prompts = [torch.randint(3, 600, (PROMPT,), generator=torch.Generator().manual_seed(row)) for row in range(ROWS)]
    reading, new_cache = CacheReading(), growing_cache if bits is None else coded_cache(bits)
    never = Stops([600], 0, 600)
    generate(tiny.eval().to(dtype), tokenizer(), prompts, NEW, never, reading, new_cache=new_cache)
    kept = {"bytes": reading.bytes, "bytes_16_bit": reading.bytes_16_bit, "positions": reading.positions}
    kept |= {"layers": reading.layers, "largest_batch_bytes": reading.largest}
    task = {"cache": kept, "rows": ROWS, "score": 50.0, "truncated": 0, "version": "1", "inputs": "a"}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "tasks": {"task": task},
        "perplexity": {"text": {"value": 2.0, "tokens": 9, "inputs": "b"}},
    }


def cut(dtype: torch.dtype, bits: int | None) -> float:
    found = reduction(cache_figures(measured(dtype, None, False)), cache_figures(measured(dtype, bits)))
    assert found is not None
    return found


@pytest.mark.parametrize("bits", [None, 8, 4, 2])
def test_a_reduction_is_the_same_in_every_dtype(bits: int | None) -> None:
    cuts = [cut(dtype, bits) for dtype in (torch.float32, torch.bfloat16)]
    assert cuts[0] == cuts[1]
    if bits is None:
        assert cuts[0] == 1 - 20 / 32
    if bits:  # control: of bytes as they are held, the same cache is cut more on a machine without bfloat16
        held = []
        for dtype in (torch.float32, torch.bfloat16):
            original, coded = (measured(dtype, *which)["tasks"]["task"]["cache"] for which in ((None, False), (bits,)))
            held.append(1 - coded["bytes"] / original["bytes"])
        assert held[0] - held[1] > 0.05 and held[1] == cuts[1]


def test_bytes_are_reported_as_held_beside_those_in_16_bits_with_their_context() -> None:
    whole, half = (cache_figures(measured(dtype, None, False)) for dtype in (torch.float32, torch.bfloat16))
    assert whole["bytes_per_token_per_layer"] == 32 * 4 and half["bytes_per_token_per_layer"] == 32 * 2
    assert whole["bytes_per_token_16_bit"] == half["bytes_per_token_16_bit"] == 2 * 32 * 2
    assert whole["mean_context"] == half["mean_context"] == CONTEXT
    assert (whole["dtype"], half["dtype"]) == ("float32", "bfloat16")


def test_a_few_bit_cache_costs_more_a_token_at_a_short_context() -> None:
    """Why a report says its context: the first and latest tokens are not coded."""
    converted = convert(model(), ConversionOptions(rope_dim=8, kv_lora_rank=12))[0].eval()
    found = []
    for length in (40, 290):  # 4 and 254 coded tokens, both in a buffer of 256
        cache = QuantizedLatentCache(converted.config, 4, 8)
        with torch.no_grad():
            converted(torch.zeros(1, length, dtype=torch.long), past_key_values=cache)
        found.append(cache_bytes(cache, number_bytes=2) / length)
    assert found[0] > 2 * found[1]


def test_codes_and_smaller_numbers_count_as_they_are() -> None:
    class Layer:
        def __init__(self) -> None:
            self.numbers, self.double = torch.zeros(10), torch.zeros(10, dtype=torch.float64)
            self.codes, self.counts = torch.zeros(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.int32)
            self.half, self.eighth = torch.zeros(10).half(), torch.zeros(10).to(torch.float8_e4m3fn)
            self.view = torch.zeros(100)[:5]

    class Layers:
        layers = (Layer(),)

    assert cache_bytes(Layers) == 10 * (4 + 8 + 1 + 4 + 2 + 1) + 400
    assert cache_bytes(Layers, number_bytes=2) == 10 * (2 + 2 + 1 + 4 + 2 + 1) + 200


def test_scores_of_an_earlier_version_keep_their_reduction_or_are_refused() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        scores = measured(dtype, 4)
        task = scores["tasks"]["task"]
        task = task | {"cache": {name: value for name, value in task["cache"].items() if name != "bytes_16_bit"}}
        earlier = scores | {"tasks": {"task": task}}
        if dtype == torch.bfloat16:
            assert cache_figures(earlier) == cache_figures(scores)
        else:
            with pytest.raises(ValueError, match="in float32 by an earlier version.*force=true"):
                cache_figures(earlier)


def test_scores_in_different_dtypes_and_of_different_texts_do_not_compare() -> None:
    original = measured(torch.float32, None, False)
    same = compare({"original": original, "converted": measured(torch.float32, None)})
    assert same["kv_cache_reduction"] == {"converted": 1 - 20 / 32}
    with pytest.raises(ValueError, match="original in float32, converted in bfloat16.*give eval.dtype"):
        compare({"original": original, "converted": measured(torch.bfloat16, None)})
    other = measured(torch.float32, None) | {"perplexity": {"text": {"value": 2.0, "tokens": 9, "inputs": "c"}}}
    with pytest.raises(ValueError, match="perplexity of 'text': the models read different windows"):
        compare({"original": original, "converted": other})

"""The packed cache of a format against windows with simulated codes; padding, beams, bytes, saved models, bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from mha2mla import ConversionOptions, QuantizedLatentCache, cache_bytes, convert
from mha2mla.bits import refit, set_format
from mha2mla.families import latent_layers
from mha2mla.modeling.cache_format_mla import BITS, format_bytes, layer_format
from mha2mla.modeling.packed_states_mla import Meaning, Packed
from mha2mla.modeling.packing_mla import PARTS, Packing, packed_bytes
from mha2mla.modeling.quantized_cache_mla import FormatCache, FormatLayer
from tests.mha2mla.test_checkpoint import block_package
from tests.tiny import FAMILIES, relative, tiny_model, tokens

MIXED = (16, 8, 6, 6, 6, 4, 4, 3, 3, 3, 2, 2, 1, 0)  # numbers of channels that fill no bytes
SEARCH = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


def formatted(family: str = "llama", scales: str = "table", residual: int = 0, **options: object) -> torch.nn.Module:
    """A converted model with a format of all bits there are, other ones for each channel."""
    model, _ = convert(tiny_model(family), ConversionOptions(**({"rope_dim": 8, "kv_lora_rank": 14} | options)))
    sizes = [layer.kv_lora_rank + layer.rope_dim for _, layer in latent_layers(model)]
    bits = [[MIXED[(3 * place + index) % len(MIXED)] for place in range(size)] for index, size in enumerate(sizes)]
    set_format(model, bits, scales, residual)
    refit(model, [tokens(4, 40, seed=n) for n in range(3)])
    return model


def stepwise(model: torch.nn.Module, ids: torch.Tensor, cache: object, prompt: int = 0, **kwargs: object) -> torch.Tensor:
    """Logits of a prompt in two pieces, then of one token at a time."""
    pieces = [*ids[:, :prompt].split(max(1, prompt - prompt // 3), 1)] if prompt else []
    with torch.no_grad():
        parts = [model(part, past_key_values=cache, **kwargs).logits for part in [*pieces, *ids[:, prompt:].split(1, 1)]]
    return torch.cat(parts, 1)


def window(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("scales", ["table", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_is_one_window_with_simulated_codes(family: str, scales: str) -> None:
    """Control: the table of one channel belongs to another."""
    model, ids = formatted(family, scales), tokens(2, 30)
    expected = window(model, ids)
    cache = FormatCache(model.config)
    assert relative(stepwise(model, ids, cache), expected) < 2e-5
    assert relative(stepwise(model, ids, FormatCache(model.config), 15), expected) < 2e-5
    assert isinstance(cache.layers[0], FormatLayer) and cache.get_seq_length() == 30
    with torch.no_grad():
        tables = latent_layers(model)[0][1].cache_tables
        place = tables.form.bits.index(6)
        tables.minimum[place] += 2 * tables.scale[place] * 63
        assert relative(stepwise(model, ids, FormatCache(model.config), 15), expected) > 1e-3

"""The original's keys and values in a few bits, behind transformers' `Cache` interface: what a conversion has to beat.

    cache = KiviCache(model.config, bits=4)
    model.generate(**inputs, past_key_values=cache)
    logits = model(input_ids, past_key_values=KiviCache(model.config, bits=2)).logits  # of a window

After KIVI (arXiv 2402.02750, section 3): keys are quantised per channel over groups of tokens, values per token over
groups of channels. The first tokens, whose states are far larger than all others', and the last group while it is
incomplete stay unquantised. A complete group is packed at once, the prompt's too, and attention gets what its codes
say. So one forward over a window measures the quantised model as decoding does, with one difference: a token of the
window gets its own group quantised, where in decoding that group is not complete yet.

All of it is dequantised at every step: this cache saves memory, not time.
"""

from typing import Any

from transformers import Cache, DynamicCache

from mha2mla.families import FAMILIES, family_of, geometry_of
from mha2mla.kivi_groups import BITS, check_bytes, group_bytes
from mha2mla.kivi_layer import KiviLayer


class KiviCache(Cache):
    """For models that are not converted, of every supported family.

    bits: of a number, 4, 3 or 2.
    group_size: tokens of a key channel that share a scale. Of a value, so many channels do, or the largest divisor of
        head_dim below that.
    residual_length: how many of the latest tokens stay unquantised at least (the paper's R); None: none but those of
        the incomplete group.
    sink_length: how many of the first tokens stay unquantised. They are the first that the cache gets: in a row that is
        padded on the left they are padding, and its own first tokens are quantised.
    max_cache_len: refused, for those who look for a static cache.

    Layers with a sliding window are quantised likewise and forget a group when it has left the window.
    Raises ValueError for bits and sizes that are not possible, a converted model and a family that is not supported.
    """

    def __init__(
        self,
        config: Any,
        bits: int = 4,
        group_size: int = 32,
        residual_length: int | None = None,
        sink_length: int = 4,
        max_cache_len: int | None = None,
    ) -> None:
        if max_cache_len is not None:
            raise ValueError(
                f"max_cache_len={max_cache_len}: a KIVI cache packs groups when they are complete and has no static "
                "form; leave it out, or take transformers' StaticCache, which does not quantise"
            )
        residual_length = check_settings(config, bits, group_size, residual_length, sink_length)
        super().__init__(
            layers=[
                KiviLayer(bits, group_size, residual_length, sink_length, window) for window in sliding_windows(config)
            ]
        )


def bytes_per_token(
    config: Any,
    bits: int,
    context: int,
    group_size: int = 32,
    residual_length: int | None = None,
    sink_length: int = 4,
) -> float:
    """Bytes a token of one sequence in a `KiviCache` that holds `context` tokens: all that it holds / context.

    Counted are codes, scales and minima of all layers, and in 16 bits the tokens that are not quantised.
    `cache_bytes(cache, number_bytes=2)` measures the same. Raises ValueError as `KiviCache` does.
    """
    residual_length = check_settings(config, bits, group_size, residual_length, sink_length)
    if context < 1:
        raise ValueError(f"context={context}: give the number of tokens that the cache holds, 1 or more")
    geometry = geometry_of(config)
    first = min(sink_length, context)
    complete = max(0, context - first - residual_length) // group_size
    token, group = 2 * 2 * geometry.head_dim, group_bytes(bits, group_size, geometry.head_dim)
    total = 0
    for window in sliding_windows(config):
        left = max(0, context + 1 - window - sink_length) // group_size if window else 0
        left = min(left, complete)
        unquantised = context - complete * group_size - (first if left else 0)
        total += token * unquantised + group * (complete - left)
    return geometry.num_kv_heads * total / context


def check_settings(config: Any, bits: int, group_size: int, residual_length: int | None, sink_length: int) -> int:
    """The residual length; ValueError says what is wrong with the rest."""
    model_type = getattr(config, "model_type", None)
    if model_type in {row.config_class.model_type for row in FAMILIES.values()}:
        raise ValueError(
            f"the model is converted (model type {model_type}) and caches latents: give an original's configuration, "
            "or take QuantizedLatentCache"
        )
    if model_type not in FAMILIES:
        family_of(config)  # says why
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits={bits} is not possible in a KIVI cache; choose one of {', '.join(map(str, BITS))}")
    residual_length = 0 if residual_length is None else residual_length
    for name, value, least in (
        ("group_size", group_size, 1),
        ("residual_length", residual_length, 0),
        ("sink_length", sink_length, 0),
    ):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}={value} is not a number of tokens; give a whole number from {least} on")
    check_bytes(group_size, geometry_of(config).head_dim)
    return residual_length


def sliding_windows(config: Any) -> list[int | None]:
    """The sliding window of every layer, None where a layer attends to everything."""
    layers: list[Any] = DynamicCache(config=config).layers  # transformers knows how each family says it
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]

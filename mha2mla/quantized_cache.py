"""A cache that keeps the latent in a few bits, behind transformers' `Cache` interface.

    cache = QuantizedLatentCache(model.config, bits=4, rope_bits=8)
    model.generate(**inputs, past_key_values=cache)

    ranges = calibrate_ranges(model, batches, bits=4, rope_bits=4)      # once; then a token costs its codes alone
    cache = QuantizedLatentCache(model.config, bits=4, rope_bits=4, ranges=ranges)

    cache = QuantizedLatentCache(model.config)      # of a model with a cache format: its own (modeling/)

The last tokens (`residual_length`) and the first (`sink_length`, whose states are far larger than all others') stay as
they are; everything between is coded, that of the prompt too, and decoded when it is attended to.

Shapes: B batch, S tokens, r kv_lora_rank, R rotated numbers. Latent [B, 1, S, r], rotated key [B, 1, S, R].
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from mha2mla import quantization
from mha2mla.families import latent_layers
from mha2mla.finite import is_finite
from mha2mla.modeling.cache_rows_mla import PackedLayer, Rows, check_crop
from mha2mla.modeling.quantized_cache_mla import FormatCache
from mha2mla.quantization import Coded, Range
from mha2mla.token_ids import known_ids

CHUNK = 2048  # tokens that are coded at once: it takes many times the memory of their codes


@dataclass
class LayerRanges:
    """A layer's ranges of every channel, [r] and [R]; `rope` is None where the rotated key stays whole."""

    latent: Range
    rope: Range | None


class Whole:
    """Tokens [B, S, n] as they are, with the products that `Coded` has."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def dot(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.tokens.mT

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        return weights @ self.tokens


class Store:
    """Tokens of one slot in codes, or as they are with bits=None."""

    def __init__(self, bits: int | None, group: int | None, fixed: Range | None) -> None:
        self.bits, self.group, self.fixed = bits, group, fixed
        self.rows = {"codes": Rows()}
        if bits is not None and fixed is None:
            self.rows |= {"low": Rows(), "scale": Rows()}

    @property
    def length(self) -> int:
        return self.rows["codes"].length

    def append(self, values: torch.Tensor) -> None:
        if self.bits is None:
            self.rows["codes"].append(values)
            return
        for some in values.split(CHUNK, 2):
            self.encode(some)

    def encode(self, values: torch.Tensor) -> None:
        assert self.bits is not None
        span = self.fixed
        if span is None:
            assert self.group is not None
            span = quantization.measure(values, self.bits, self.group)
            self.rows["low"].append(span.low)
            self.rows["scale"].append(span.scale)
        elif span.low.device != values.device:
            span = self.fixed = Range(span.low.to(values.device), span.scale.to(values.device))
        self.rows["codes"].append(quantization.encode(values, span, self.bits))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        codes = self.rows["codes"].view()
        if self.bits is None:
            return codes
        return quantization.decode(codes, self.span(), self.bits, dtype)

    def span(self) -> Range:
        return self.fixed or Range(self.rows["low"].view(), self.rows["scale"].view())

    def products(self, dtype: torch.dtype) -> Coded | Whole:
        """What takes products with all tokens, without decoding them."""
        codes = self.rows["codes"].view()
        return Whole(codes[:, 0]) if self.bits is None else Coded(codes, self.span(), self.bits, dtype)

    def crop(self, length: int) -> None:
        for rows in self.rows.values():
            rows.length = min(rows.length, length)


class States:
    """One slot's tokens [B, 1, S, n] in parts, whole or coded, and what absorbed attention does with them.

    Products are taken with the codes themselves: decoding every token at every step would take longer than attending.
    """

    def __init__(self, first: torch.Tensor, store: Store, latest: torch.Tensor) -> None:
        self.first, self.store, self.latest = first, store, latest
        self.sinks = first.shape[2]
        self.shape = (*first.shape[:2], self.sinks + store.length + latest.shape[2], first.shape[3])

    def dense(self) -> torch.Tensor:
        """All tokens as numbers, [B, 1, S, n]."""
        coded = [self.store.read(self.first.dtype)] if self.store.length else []
        return torch.cat([self.first, *coded, self.latest], 2)

    @cached_property
    def whole(self) -> Whole:
        """First and latest tokens side by side."""
        return Whole(torch.cat((self.first, self.latest), 2)[:, 0])

    @cached_property
    def coded(self) -> Coded | Whole:
        return self.store.products(self.first.dtype)

    def dot(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, Q, S] from rows [B, Q, n]."""
        whole = self.whole.dot(rows)
        if not self.store.length:
            return whole
        return torch.cat((whole[:, :, : self.sinks], self.coded.dot(rows), whole[:, :, self.sinks :]), 2)

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """[B, Q, n] from weights [B, Q, S]."""
        if not self.store.length:
            return self.whole.mix(weights)
        first, coded, latest = weights.split([self.sinks, self.store.length, self.latest.shape[2]], 2)
        return self.whole.mix(torch.cat((first, latest), 2)) + self.coded.mix(coded)


class Joined:
    """Two slots' states side by side, [B, 1, S, n + m]: a rotated key in codes, and the scales of normed keys."""

    def __init__(self, first: States, second: States) -> None:
        self.parts = first, second
        self.shape = (*first.shape[:3], first.shape[3] + second.shape[3])

    def dense(self) -> torch.Tensor:
        return torch.cat([part.dense() for part in self.parts], -1)

    def dot(self, rows: torch.Tensor) -> torch.Tensor:
        first, second = self.parts
        size = first.shape[3]
        return first.dot(rows[..., :size]) + second.dot(rows[..., size:])


class QuantizedLatentLayer(PackedLayer):
    """One layer: `sinks` in full, then codes, then the latest tokens in full.

    Behind the rotated key's `rope_dim` numbers stand the scales of normed keys, if there are any: few, and all of a key
    hangs on them, so they stay whole.
    """

    def __init__(self, latent: Store, rope: Store, rope_dim: int, residual_length: int, sink_length: int) -> None:
        super().__init__()
        self.stores: tuple[Store, ...] = (latent, rope)
        self.rope_dim = rope_dim
        self.residual_length, self.sink_length = residual_length, sink_length
        self.sinks: list[torch.Tensor] = []  # latent, rotated key and, of normed keys, scales
        self.recent: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        parts = self.parts(key_states, value_states)
        if len(parts) > len(self.stores):
            self.stores = (*self.stores, Store(None, None, None))
        self.sinks = [states[:, :, :0] for states in parts]
        self.recent = list(self.sinks)
        self.is_initialized = True

    def parts(self, latent: torch.Tensor, rope: torch.Tensor) -> list[torch.Tensor]:
        """What is kept apart: latent, rotated key and, where they ride behind it, scales."""
        scales = rope[..., self.rope_dim :]
        return [latent, rope[..., : self.rope_dim], *([scales] if scales.shape[-1] else [])]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append latent and rotated key; returns both as `States`, which MLAAttention knows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        room = self.sink_length - self.sinks[0].shape[2] if self.stores[0].length == 0 else 0
        added = self.parts(key_states, value_states)
        latest = [torch.cat(pair, 2) for pair in zip(self.recent, added, strict=True)]
        if room > 0:
            self.sinks = [
                torch.cat((sink, states[:, :, :room]), 2) for sink, states in zip(self.sinks, latest, strict=True)
            ]
            latest = [states[:, :, room:] for states in latest]
        excess = latest[0].shape[2] - self.residual_length
        if excess > 0:
            for store, states in zip(self.stores, latest, strict=True):
                store.append(states[:, :, :excess])
            latest = [states[:, :, excess:].clone() for states in latest]  # not a view: it would keep the whole alive
        self.recent = latest
        return self.states(0), self.states(1)

    def states(self, slot: int) -> States | Joined:
        """All that is cached of a slot: 0 the latent, 1 the rotated key and what rides behind it."""
        latent, rope, *scales = (States(*parts) for parts in zip(self.sinks, self.stores, self.recent, strict=True))
        if slot == 0:
            return latent
        return Joined(rope, scales[0]) if scales else rope

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        return self.sinks[0].shape[2] + self.stores[0].length + self.recent[0].shape[2]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number as transformers does."""
        check_crop(tokens_to_remove)
        if not self.is_initialized or not tokens_to_remove:
            return
        keep = max(0, self.get_seq_length() + tokens_to_remove)
        self.sinks = [states[:, :, :keep] for states in self.sinks]
        keep -= self.sinks[0].shape[2]
        left = max(0, keep - self.stores[0].length)
        for store in self.stores:
            store.crop(keep)
        self.recent = [states[:, :, :left] for states in self.recent]

    def change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.sinks = [change(states) for states in self.sinks]
            self.recent = [change(states) for states in self.recent]
            for store in self.stores:
                for rows in store.rows.values():
                    rows.change_batch(change)

    def reset(self) -> None:
        self.sinks, self.recent, self.is_initialized = [], [], False
        for store in self.stores:
            for rows in store.rows.values():
                rows.buffer, rows.length = None, 0


class QuantizedLatentCache(FormatCache):
    """For models that this package converted.

    config: the model's. Alone, of a model with a cache format, it gives that cache.
    bits: of the latent, 2, 3, 4 or 8. rope_bits: of the rotated key, or None to keep it whole.
    group_size: channels that share a range, measured for every token and stored with it; default: the largest divisor
        of r up to 32 (of R for the rotated key, at most that). Unused with ranges, one `LayerRanges` a layer from
        `calibrate_ranges`.
    Raises ValueError for bits and groups that the sizes cannot express.
    """

    def __init__(
        self,
        config: Any,
        bits: int = 4,
        rope_bits: int | None = None,
        group_size: int | None = None,
        residual_length: int = 32,
        sink_length: int = 4,
        ranges: list[LayerRanges] | None = None,
    ) -> None:
        layers: list[Any] = []
        asked = (bits, rope_bits, group_size, residual_length, sink_length, ranges)
        if config.cache_format and asked == (4, None, None, 32, 4, None):
            super().__init__(config)
            return
        if config.served:
            raise ValueError("a model's serving form expands latents itself; use the checkpoint it was exported from")
        rope_dim = config.rope_dim
        ranks = config.layer_kv_lora_rank or [config.kv_lora_rank] * config.num_hidden_layers
        latent_numbers = config.latent_layers or range(len(ranks))
        for index, rank in enumerate(ranks):
            if index not in latent_numbers:  # of a sliding window, left as it was
                layers.append(DynamicSlidingWindowLayer(sliding_window=config.sliding_window))
                continue
            own = ranges[index] if ranges else None
            group = group_size or quantization.largest_divisor(rank, 32)
            rope_group = quantization.largest_divisor(rope_dim, group)
            quantization.check(bits, rank, None if own else group, f"latent of {rank} (layer {index})")
            if rope_bits is not None:
                quantization.check(rope_bits, rope_dim, None if own else rope_group, f"rotated key of {rope_dim}")
                if own and own.rope is None:
                    raise ValueError(f"rope_bits={rope_bits}, but the ranges were calibrated without rope_bits")
            latent = Store(bits, group, own.latent if own else None)
            rope = Store(rope_bits, rope_group, own.rope if own and rope_bits is not None else None)
            layers.append(QuantizedLatentLayer(latent, rope, rope_dim, residual_length, sink_length))
        super().__init__(config, layers)


@torch.no_grad()
def calibrate_ranges(
    model: Any, batches: Iterable[torch.Tensor], bits: int, rope_bits: int | None, tokens: int = 4096
) -> list[LayerRanges]:
    """Ranges of every channel of every layer's latent and rotated key, from the first `tokens` tokens of text.

    batches: input_ids [B, S] without padding. The first four tokens of a sequence are left out, as caches keep them
    whole. Raises ValueError without text, and where latents are not finite.
    """
    found: list[list[list[torch.Tensor]]] = [[[], []] for _ in range(model.config.num_hidden_layers)]
    seen = 0
    for batch in batches:
        if seen >= tokens:
            break
        cache = DynamicCache()
        model.base_model(input_ids=known_ids(model, batch).to(model.device), past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers
        for slots, layer in zip(found, layers, strict=True):
            rope = layer.values[..., : model.config.rope_dim]  # without the scales of normed keys, which stay whole
            for slot, states in zip(slots, (layer.keys, rope), strict=True):
                slot.append(states[:, 0, 4:].flatten(0, 1).float())
                if not is_finite(slot[-1]):
                    raise ValueError("the model's latents are not finite on the calibration text: no range holds them")
        seen += batch.numel()
    if not seen:
        raise ValueError("calibration text is empty: calibrate_ranges needs at least one batch")
    ranges = []
    for latent, rope in found:
        rope_range = None if rope_bits is None else quantization.fit_channels(torch.cat(rope), rope_bits)
        ranges.append(LayerRanges(quantization.fit_channels(torch.cat(latent), bits), rope_range))
    return ranges


@torch.no_grad()
def rotate_latents(model: Any, seed: int = 0) -> None:
    """Turn every layer's latent by a random orthogonal matrix, in place, which changes no output.

    Both projections take it over, so it costs nothing; every channel becomes a mixture of all, without channels whose
    range a few tokens set. (QuaRot, arXiv 2404.00456, does this for whole models.)
    """
    generator = torch.Generator().manual_seed(seed)
    for _, layer in latent_layers(model):
        rank = layer.kv_lora_rank
        matrix, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
        matrix = matrix.to(layer.kv_b_proj.weight.device)
        down, up = layer.kv_a_proj_with_mqa, layer.kv_b_proj
        down.weight[:rank] = (matrix @ down.weight[:rank].double()).to(down.weight)
        if down.bias is not None:
            down.bias[:rank] = (matrix @ down.bias[:rank].double()).to(down.bias)
        up.weight.copy_(up.weight.double() @ matrix.T)

"""The cache of a model with a format: packed codes behind transformers' `Cache` interface, made unasked by `generate`.

Codes cover all tokens but the latest `residual_length`; the first `sink_length` of every sequence, wherever it starts
in its row, are kept unquantised beside their codes and put in their place. With residual_length=0 even the newest token
is read from its codes, so decoding token by token gives what one window with simulated codes gives.

Two slots: the latent [B, 1, T, r], and the rotated key [B, 1, T, R + s] with s scales of normed keys behind it, which
are kept as they are: few, and all of a key hangs on them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .cache_format_mla import CacheTables, LayerFormat, layer_format, place_of
from .cache_rows_mla import MeanKeys, PackedLayer, Rows, Starts, Turns, check_crop
from .packed_states_mla import Meaning, Packed

CHUNK = 2048  # tokens that are encoded at once: it takes many times the memory of their codes


class Reading:
    """How a layer's codes are read: the model's tables and what follows from them, which no cache holds of its own."""

    of_model = True  # mha2mla/cache.py does not count it

    def __init__(self, tables: CacheTables, extra: int, pairs: torch.Tensor, turns: Turns | None) -> None:
        """extra: numbers behind a rotated key."""
        form = tables.form
        rank, channels = form.rank, len(form.bits)
        self.tables = tables
        self.parts = slice(0, rank), slice(rank, channels)
        self.slots = Meaning(tables, self.parts[0]), Meaning(tables, self.parts[1], extra)
        self.means = MeanKeys(tables.key_mean, pairs, turns)
        self.levels, self.fixed = tables.levels, tables.spans(None)

    def spans(self, factors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fixed if factors is None else self.tables.spans(factors)

    def encode(self, channels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes [B, 1, S, r + R], uint8, of as many channels, and factors [B, 1, S, k]."""
        wide = channels.float()
        factors = self.tables.factors(wide)
        codes = place_of(wide, *self.spans(factors), self.levels).round_().to(torch.uint8)
        return codes, factors


class FormatLayer(PackedLayer):
    """One layer's tokens."""

    reading: Reading

    def __init__(self, form: LayerFormat, index: int) -> None:
        super().__init__()
        self.form, self.index = form, index
        self.clear()

    def clear(self) -> None:
        self.is_initialized = False
        self.starts = Starts()
        self.codes, self.kept, self.factors = (Rows(3), Rows(3)), (Rows(), Rows()), Rows(3)
        self.first: list[torch.Tensor] = []
        self.recent: list[torch.Tensor] = []
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        states = key_states, value_states
        self.first = [own.new_zeros(*own.shape[:2], self.form.sink_length, own.shape[3]) for own in states]
        self.recent = [own[:, :, :0] for own in states]
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **kwargs: Any) -> Any:
        """Append latent and rotated key; returns both as `States`, which MLAAttention knows.

        kwargs: `tables`, the layer's CacheTables; `rotation`, `pairs`, `turns` and `position_ids` of the new tokens.
        Raises ValueError for the states of another model.
        """
        tables = kwargs.get("tables")
        if not self.is_initialized or tables is not self.reading.tables:
            self.check(tables)
            turns = None if kwargs["rotation"] is None else kwargs["turns"]
            with torch.no_grad():
                extra = value_states.shape[3] - self.form.rope_dim
                self.reading = Reading(kwargs["tables"], extra, kwargs["pairs"], turns)
        with torch.no_grad():
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.append([key_states.detach(), value_states.detach()], kwargs)
        return self.states(0), self.states(1)

    def check(self, tables: CacheTables | None) -> None:
        if tables is None or tables.form != self.form:
            theirs = "none" if tables is None else f"another of {len(tables.form.bits)} channels"
            raise ValueError(
                f"layer {self.index}: the cache is of a format of {len(self.form.bits)} channels and the model has "
                f"{theirs}; give the cache of this model's configuration, or none"
            )

    def append(self, states: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
        batch, _, new, _ = states[0].shape
        anew = self.starts.see(kwargs.get("position_ids"), batch, self.length, new)
        turns = self.reading.means.turns
        if turns is not None:
            turns.see(kwargs["rotation"], self.starts, self.length, anew)
        self.keep_first(states, anew)
        self.length += new
        latest = [torch.cat(pair, 2) for pair in zip(self.recent, states, strict=True)]
        excess = latest[0].shape[2] - self.form.residual_length
        if excess > 0:
            for start in range(0, excess, CHUNK):
                self.encode([own[:, :, start : min(excess, start + CHUNK)] for own in latest])
            latest = [own[:, :, excess:].clone() for own in latest]  # not a view: it would keep all of it alive
        self.recent = latest

    def keep_first(self, states: list[torch.Tensor], anew: bool) -> None:
        """Put those of new tokens that are the first of their sequence where they are kept."""
        end, new = self.form.sink_length, states[0].shape[2]
        aligned = self.starts.aligned
        if not anew and aligned is not None and self.length - aligned >= end:
            return
        if aligned is not None:
            start = max(0, self.length - aligned)  # position of the first new token that is no padding
            skipped = max(0, aligned - self.length)
            count = min(end - start, new - skipped)
            if count > 0:
                for kept, own in zip(self.first, states, strict=True):
                    kept[:, :, start : start + count] = own[:, :, skipped : skipped + count]
            return
        assert self.starts.slots is not None
        places = self.starts.slots[:, None] + torch.arange(end, device=self.device) - self.length  # [B, sinks]
        is_new = ((places >= 0) & (places < new))[:, None, :, None]
        places = places.clamp(0, new - 1)[:, None, :, None]
        for kept, own in zip(self.first, states, strict=True):
            kept.copy_(torch.where(is_new, own.gather(2, places.expand_as(kept)), kept))

    def encode(self, states: list[torch.Tensor]) -> None:
        """Append the codes of tokens, which follow those that have theirs."""
        reading = self.reading
        latent, rope = states
        start, end = self.codes[0].length, self.codes[0].length + latent.shape[2]
        own = rope[..., : self.form.rope_dim]
        own = own - reading.means.dense(self.starts, start, end).to(own.dtype)
        codes, factors = reading.encode(torch.cat((latent, own), -1))
        # Of rotated keys, channels of 16 bits too are differences from the mean key.
        given = latent, torch.cat((own, rope[..., self.form.rope_dim :]), -1)
        for slot, meaning in enumerate(reading.slots):
            self.codes[slot].append(meaning.packing.pack(codes[..., reading.parts[slot]]))
            if len(meaning.whole):
                self.kept[slot].append(given[slot][..., meaning.whole])
        if factors is not None:
            self.factors.append(factors.half().mT)

    def packed(self, slot: int) -> Packed:
        kept, factors = self.kept[slot], self.factors
        return Packed(
            self.reading.slots[slot],
            self.codes[slot].view()[:, 0],
            kept.view()[:, 0] if kept.length else None,
            factors.view()[:, 0] if factors.length else None,
        )

    def decode(self, slot: int) -> torch.Tensor:
        """Tokens that have codes, [B, 1, T, n]."""
        reading, meaning, part = self.reading, self.reading.slots[slot], self.reading.parts[slot]
        found = []
        for start in range(0, self.codes[slot].length, CHUNK):
            tokens = slice(start, min(start + CHUNK, self.codes[slot].length))
            factors = self.factors.view()[..., tokens].mT.float() if self.factors.length else None
            minimum, scale = (values[..., part] for values in reading.spans(factors))
            own = minimum + scale * meaning.packing.codes(self.codes[slot].view()[..., tokens])
            own = nn.functional.pad(own.to(self.dtype), (0, meaning.size - meaning.channels))
            if len(meaning.whole):
                own[..., meaning.whole] = self.kept[slot].view()[:, :, tokens]
            if slot == 1:
                own[..., : meaning.channels] += reading.means.dense(self.starts, start, tokens.stop).to(self.dtype)
            found.append(own)
        return torch.cat(found, 2) if found else self.recent[slot][:, :, :0]

    def states(self, slot: int) -> "States":
        """All that is cached of a slot: 0 the latent, 1 the rotated key and what rides behind it."""
        return States(self, slot)

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number as transformers does."""
        check_crop(tokens_to_remove)
        self.length = max(0, self.length + tokens_to_remove)
        for rows in self.rows():
            rows.length = min(rows.length, self.length)
        left = self.length - self.codes[0].length
        self.recent = [states[:, :, :left] for states in self.recent]

    def rows(self) -> list[Rows]:
        return [*self.codes, *self.kept, self.factors]

    def change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for rows in self.rows():
            rows.change_batch(change)
        self.first, self.recent = ([change(own) for own in states] for states in (self.first, self.recent))
        self.starts.change_batch(change)

    def reset(self) -> None:
        self.clear()


class States:
    """One slot's tokens [B, 1, T, n] as attention reads them: codes, with the first and latest tokens as they are."""

    def __init__(self, layer: FormatLayer, slot: int) -> None:
        self.layer, self.slot = layer, slot
        self.first, self.recent = layer.first[slot], layer.recent[slot]
        self.coded = layer.codes[slot].length
        self.shape = (*self.first.shape[:2], layer.length, self.first.shape[3])

    def firsts(self) -> tuple[int, int]:
        """The slots of first tokens, where they are those of all rows."""
        start = self.layer.starts.least
        return start, min(start + self.first.shape[2], self.layer.length)

    def places(self) -> torch.Tensor:
        """Which first token stands in every slot, [B, 1, T]; others are outside of 0..sinks - 1."""
        return self.layer.starts.positions(0, self.layer.length)[:, None]

    def put(self, found: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """found [B, Q, T] with the first tokens' own, [B, Q, sinks], in their slots."""
        if not first.shape[2]:
            return found
        if self.layer.starts.aligned is not None:
            start, end = self.firsts()
            if end > start:
                found[:, :, start:end] = first[:, :, : end - start]
            return found
        places = self.places().expand(-1, found.shape[1], -1)
        known = first.gather(2, places.clamp(0, first.shape[2] - 1))
        return torch.where((places >= 0) & (places < first.shape[2]), known, found)

    def take(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weights [B, Q, T] without those of first tokens, and these, [B, Q, sinks]."""
        first = weights.new_zeros(*weights.shape[:2], self.first.shape[2])
        if not first.shape[2]:
            return weights, first
        if self.layer.starts.aligned is not None:
            start, end = self.firsts()
            first[:, :, : max(0, end - start)] = weights[:, :, start:end]
            weights = weights.clone()
            weights[:, :, start:end] = 0
            return weights, first
        places = self.places().expand(-1, weights.shape[1], -1)
        is_first = (places >= 0) & (places < first.shape[2])
        first.scatter_add_(2, places.clamp(0, first.shape[2] - 1), weights * is_first)
        return weights.masked_fill(is_first, 0), first

    def dense(self) -> torch.Tensor:
        """All tokens as numbers, [B, 1, T, n]."""
        found = torch.cat((self.layer.decode(self.slot), self.recent), 2)
        if not self.first.shape[2]:
            return found
        if self.layer.starts.aligned is not None:
            start, end = self.firsts()
            found[:, :, start:end] = self.first[:, :, : max(0, end - start)]
            return found
        places = self.places()[..., None].clamp(0, self.first.shape[2] - 1).expand_as(found)
        is_first = ((self.places() >= 0) & (self.places() < self.first.shape[2]))[..., None]
        return torch.where(is_first, self.first.gather(2, places), found)

    def dot(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, Q, T] from rows [B, Q, n]."""
        parts = []
        if self.coded:
            bias = None
            if self.slot == 1:
                layer = self.layer
                bias = layer.reading.means.dot(rows[..., : layer.form.rope_dim], layer.starts, self.coded)
            parts.append(self.layer.packed(self.slot).dot(rows, bias))
        if self.recent.shape[2] or not parts:
            parts.append(rows @ self.recent[:, 0].mT)
        found = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return self.put(found, rows @ self.first[:, 0].mT)

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """[B, Q, n] from weights [B, Q, T]."""
        rest, first = self.take(weights)
        found = first @ self.first[:, 0]
        if self.recent.shape[2]:
            found = found + rest[:, :, self.coded :] @ self.recent[:, 0]
        if self.coded:
            found = found + self.layer.packed(self.slot).mix(rest[:, :, : self.coded])
        return found


class FormatCache(Cache):
    """The cache of a model with a format.

    config: the model's; layers: others than its format's. Raises ValueError where it has neither.
    """

    def __init__(self, config: Any, layers: list[Any] | None = None) -> None:
        if layers is None:
            if not config.cache_format:
                raise ValueError("the model has no cache format: its cache is transformers' DynamicCache")
            if config.served:
                raise ValueError("a model's serving form expands latents itself; use the checkpoint it came from")
            layers = [cache_layer(config, index) for index in range(config.num_hidden_layers)]
        super().__init__(layers=layers)
        self.turns: dict[Any, Turns] = {}
        self.kinds = rotation_kinds(config)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if layer_idx >= len(self.layers):
            raise ValueError(f"the cache is of a model with {len(self.layers)} layers, and this is layer {layer_idx}")
        if kwargs.get("rotation") is not None:
            kwargs["turns"] = self.turns.setdefault((self.kinds[layer_idx], key_states.device), Turns())
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def cache_layer(config: Any, index: int) -> Any:
    if config.latent_layers is not None and index not in config.latent_layers:  # of a sliding window, left as it was
        return DynamicSlidingWindowLayer(sliding_window=config.sliding_window)
    form = layer_format(config, index)
    return DynamicLayer() if form is None else FormatLayer(form, index)


def rotation_kinds(config: Any) -> list[str]:
    """Which layers rotate alike: some families have a rotation for every type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(own, dict) for own in parameters.values()):
        return list(config.layer_types)
    return [""] * config.num_hidden_layers

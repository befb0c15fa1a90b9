"""What a conversion is asked for, checked against the model's geometry before any work starts."""

from dataclasses import dataclass, fields, replace
from typing import Any

# Choices of pairs that keep as many of every key head.
PER_HEAD = {"high", "low", "uniform", "2-norm"}
ROPE = ("partial", "latent", "full", "auto")
ROPE_PARTIAL = ("partial_rope", "rope_basis", "frequency_folding", "expected_rotation")  # read where rope=partial
LAYERS = ("all", "full-attention")
BITS = (16, 8, 6, 4, 3, 2, 1)  # of every channel, or `auto`
CHANNEL_BITS = 12  # of a budget that bits share out, for every rotated number (docs/log.md)
SINKS = 4  # first tokens of a sequence, which a format leaves unquantised
RUN = 8  # channels whose codes fill bytes, whatever their bits
DEFAULT_REDUCTION = 0.6875  # the paper's first setting: 24 + 96 of 384 numbers on SmolLM-135M
DEFAULT_BYTES = 0.875  # with bits fewer than 16


@dataclass(frozen=True)
class Geometry:
    """Attention sizes of the original model: d, H, G, D, and F rotary pairs a head.

    rotary_dim: numbers of a head that rotate, 2 F; 0: all of them.
    key_scales: numbers that the latent cache holds a token a layer for norms on keys: 0 without, 1 for one over all
        heads, else G.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int = 0
    key_scales: int = 0

    @property
    def num_pairs(self) -> int:
        return (self.rotary_dim or self.head_dim) // 2

    @property
    def rotary_size(self) -> int:
        """Numbers of all keys of a token that rotate: the largest R."""
        return 2 * self.num_pairs * self.num_kv_heads

    @property
    def key_size(self) -> int:
        """G * D: numbers in all keys of a token."""
        return self.num_kv_heads * self.head_dim

    @property
    def cache_size(self) -> int:
        """2 * G * D: numbers the original cache holds a token a layer."""
        return 2 * self.key_size

    def full_rank(self, rope_dim: int, low_rank: str = "joint") -> int:
        """Rank of [keys that lost their rotation; values]: the largest latent that means anything."""
        keys, values = self.key_size - rope_dim, self.key_size
        if low_rank == "split":
            return min(keys, self.hidden_size) + min(values, self.hidden_size)
        return min(keys + values, self.hidden_size)


@dataclass(frozen=True)
class ConversionOptions:
    """Sizes and strategies of a conversion.

    rope: `partial`: rotated keys are cached beside the latent, as in DeepSeek's models. `latent`: the same pairs
        rotate, but after the latent, which they are made from: nothing else is cached, and un-rotated numbers need
        fewer bits. `full`: so do all keys. Exact at full rank, but slow: every step of decoding rebuilds all cached
        keys; the options that choose what rotates (partial_rope, rope_basis, frequency_folding, expected_rotation,
        rope_dim) must be left out. `auto`: partial where bits=16, else latent, or full where keys pass a norm.
    rope_dim: R, rotated numbers a token a layer, all heads together; None: an eighth of the keys where every key head
        keeps as many (the paper's share), half of what rotates with rope=latent, else a quarter to a third of R + r.
    kv_lora_rank: r, size of the latent; None: what `reduction` leaves after R.
    reduction: wanted cut of the cache as a fraction; default 0.6875, and 0.875 where bits are fewer than 16. With 16 it
        is used only where kv_lora_rank is None.
    partial_rope: which pairs keep their rotation, a name of `mha2mla.partial_rope.STRATEGIES`.
    rope_basis: the basis that pairs are chosen in, a name of `mha2mla.basis.STRATEGIES`; always `heads` where every
        key head has a norm of its own.
    frequency_folding: neighbouring frequencies that share a basis and rotate as one; 1: each has its own. More are an
        approximation, which does not vanish at full budget.
    expected_rotation: pairs that stop rotating get their mean rotation over near distances instead of none.
    low_rank: how keys and values are factored, a name of `mha2mla.low_rank.STRATEGIES`.
    value_weight: λ of low_rank="attention", the weight of the values' error against the keys'.
    rank_allocation: how the layers share the latents' budget, a name of `mha2mla.allocation.STRATEGIES`; all but
        `uniform` give each layer its own rank, of which kv_lora_rank is then the mean.
    q_lora_rank: rank of a factored query projection; None keeps it whole.
    layers: `all`, or `full-attention` to leave the layers of a sliding window as they are, whose cache is short.
    bits: of every cached channel. 16 is a cut by rank alone, as published methods make it. `auto` shares the bytes that
        `reduction` leaves out to all channels by what each is worth to the loss, from full rank unless kv_lora_rank
        says less (mha2mla/bits.py); 8, 6, 4, 3, 2 or 1 give all channels as many. `reduction` is then a cut in bytes of
        everything that a cache of `context` tokens holds.
    context: tokens of that cache; its first tokens, which stay unquantised, weigh less the longer it is.
    cache_scales: `table`, calibrated for good, or `token`, one factor a token and run of channels beside them.
    residual_length: latest tokens that stay unquantised.
    importance: how bits=auto tells what a channel is worth, a name of `mha2mla.importance.IMPORTANCE`.
    latent_basis: of a latent in few bits: `loss`, in which the loss minds errors in all channels alike, or `factors`,
        as `low_rank` leaves it.
    """

    rope: str = "partial"
    rope_dim: int | None = None
    kv_lora_rank: int | None = None
    reduction: float | None = None
    partial_rope: str = "high"
    rope_basis: str = "heads"
    frequency_folding: int = 1
    expected_rotation: bool = False
    low_rank: str = "joint"
    value_weight: float = 0.35
    rank_allocation: str = "uniform"
    q_lora_rank: int | None = None
    layers: str = "all"
    bits: int | str = 16
    context: int = 4096
    cache_scales: str = "table"
    residual_length: int = 0
    importance: str = "fisher"
    latent_basis: str = "loss"

    @classmethod
    def from_config(cls, config: Any) -> "ConversionOptions":
        """From an object with attributes of the same names; those it lacks keep their defaults."""
        given = {item.name: getattr(config, item.name) for item in fields(cls) if hasattr(config, item.name)}
        if str(given.get("bits")).isdecimal():
            given["bits"] = int(given["bits"])
        return cls(**given)

    def by_rank(self) -> "ConversionOptions":
        """The same options with 16 bits a channel; a rank that is given counts, or else the reduction."""
        return replace(self, bits=16, reduction=self.reduction if self.kv_lora_rank is None else None)

    def resolve(self, geometry: Geometry) -> "ConversionOptions":
        """The same options with R and r as numbers that fit the model; ValueError names what does not."""
        self._check_bits()
        if self.rope == "auto":
            return self._with_rope(geometry).resolve(geometry)
        self._check_rope()
        geometry = self.cached(geometry)
        if self.bits != "auto" and self.kv_lora_rank is not None and self.reduction is not None:
            raise ValueError(
                f"kv_lora_rank={self.kv_lora_rank} and reduction={self.reduction} both say how large the latent is; "
                "give one of them"
            )
        if self.layers not in LAYERS:
            raise ValueError(f"layers={self.layers!r} is unknown; choose one of: {', '.join(LAYERS)}")
        if self.frequency_folding < 1 or geometry.num_pairs % self.frequency_folding:
            raise ValueError(
                f"frequency_folding={self.frequency_folding} must divide the {geometry.num_pairs} frequencies of a head"
            )
        if geometry.key_scales and self.frequency_folding > 1:
            raise ValueError(
                f"frequency_folding={self.frequency_folding} mixes frequencies, which this model's norms on queries "
                "and keys multiply apart; use frequency_folding=1"
            )
        if geometry.key_scales and self.rope == "latent":
            raise ValueError(
                "rope=latent cannot absorb keys that pass a norm, as this model's do: it would cache the norm's scales "
                "in 16 bits; use rope=full (method=full-rope) or rope=partial"
            )
        if geometry.key_scales > 1 and self.rope_basis != "heads":
            # Every key head has a scale of its own a token: only heads as they are come out of the latent exactly.
            return replace(self, rope_basis="heads").resolve(geometry)
        rope_dim = self._rope_dim(geometry)
        cached = replace(self, rope_dim=rope_dim).cached_rope_dim
        rank, full = self._rank(geometry, cached), geometry.full_rank(cached, self.low_rank)
        if not 1 <= rank <= full:
            raise ValueError(
                f"kv_lora_rank={rank} with rope_dim={rope_dim} is outside 1..{full}: full rank is {full} "
                f"(2·G·D − R = {geometry.cache_size - cached} that are cached, hidden size {geometry.hidden_size})"
            )
        if self.low_rank == "split" and rank % 2:
            raise ValueError(f"low_rank=split shares the latent evenly: kv_lora_rank={rank} must be even")
        query_full = min(geometry.hidden_size, geometry.num_heads * geometry.head_dim)
        if self.q_lora_rank is not None and not 1 <= self.q_lora_rank <= query_full:
            raise ValueError(f"q_lora_rank={self.q_lora_rank} is outside 1..{query_full} (full rank); None keeps W_q")
        if self.bits == "auto":
            self.channel_bits(geometry, rank + cached)
        reduction = self.cut if self.bits == "auto" else None
        return replace(self, rope_dim=rope_dim, kv_lora_rank=rank, reduction=reduction)

    def cached(self, geometry: Geometry) -> Geometry:
        """The geometry whose cache these options describe: with rope=full, whose keys are normed when they are made
        from the latent, it holds no scales of keys."""
        return replace(geometry, key_scales=0) if self.rope == "full" else geometry

    @property
    def cached_rope_dim(self) -> int:
        """Rotated numbers that the cache holds, of options that are resolved."""
        return (self.rope_dim or 0) if self.rope == "partial" else 0

    def _with_rope(self, geometry: Geometry) -> "ConversionOptions":
        """What rope=auto is for a model: rotated numbers are dear in few bits, and norms cannot be absorbed."""
        if self.bits == 16:
            return replace(self, rope="partial")
        if not geometry.key_scales:
            return replace(self, rope="latent")
        defaults: dict[str, Any] = {item.name: item.default for item in fields(self) if item.name in ROPE_PARTIAL}
        return replace(self, rope="full", **defaults)

    def _check_rope(self) -> None:
        if self.rope not in ROPE:
            raise ValueError(f"rope={self.rope!r} is unknown; choose one of: {', '.join(ROPE)}")
        if self.rope != "full":
            return
        defaults = {item.name: item.default for item in fields(self)}
        given = [f"{name}={getattr(self, name)}" for name in ROPE_PARTIAL if getattr(self, name) != defaults[name]]
        given += [f"rope_dim={self.rope_dim}"] if self.rope_dim else []
        if given:
            raise ValueError(
                f"rope=full rotates every key when it is made from the latent: {', '.join(given)} would have no "
                "effect; leave it out (method=full-rope does), or use rope=partial or rope=latent"
            )

    def _check_bits(self) -> None:
        if self.bits != "auto" and self.bits not in BITS:
            raise ValueError(f"bits={self.bits} is not possible; choose auto or one of {', '.join(map(str, BITS))}")
        for name, allowed in (("cache_scales", ("table", "token")), ("latent_basis", ("loss", "factors"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of: {', '.join(allowed)}")
        if self.residual_length < 0 or self.context <= self.residual_length + SINKS:
            raise ValueError(
                f"context={self.context} must be longer than the {SINKS} first and residual_length="
                f"{self.residual_length} latest tokens, which stay unquantised"
            )

    def _rope_dim(self, geometry: Geometry) -> int:
        if self.rope == "full":
            return 0
        step = 2 * geometry.num_kv_heads if self.partial_rope in PER_HEAD else 2  # a pair for each key/value head
        rope_dim = self.rope_dim
        if rope_dim is None and self.rope == "latent":
            rope_dim = max(step, geometry.rotary_size // 2 // step * step)
        elif rope_dim is None and self.partial_rope in PER_HEAD:
            rope_dim = max(step, min(geometry.rotary_size, geometry.key_size // 8 // step * step))
        elif rope_dim is None and self.bits != 16:
            share = int(self.channel_bits(geometry, geometry.cache_size) / CHANNEL_BITS)
            rope_dim = max(2, min(geometry.rotary_size // 2, share) // RUN * RUN or share // 2 * 2)
        elif rope_dim is None:
            rope_dim = self._share_of_budget(geometry)
        if not 0 < rope_dim <= geometry.rotary_size:
            raise ValueError(
                f"rope_dim={rope_dim} is outside 2..{geometry.rotary_size} (G·D = "
                f"{geometry.num_kv_heads}·{2 * geometry.num_pairs}, where every pair rotates)"
            )
        if rope_dim % step:
            below = max(step, rope_dim // step * step)
            raise ValueError(
                f"rope_dim={rope_dim} cannot be shared by {geometry.num_kv_heads} key/value heads in whole pairs; "
                f"it must be a multiple of {step}, for example {below}"
            )
        return rope_dim

    @property
    def cut(self) -> float:
        """The fraction of the cache that is to go."""
        default = DEFAULT_REDUCTION if self.bits == 16 else DEFAULT_BYTES
        return default if self.reduction is None else self.reduction

    def _budget(self, geometry: Geometry) -> int:
        """R + r, where a reduction says how large the cache may be."""
        if self.bits == "auto":
            return geometry.cache_size
        if self.bits == 16:
            return int(geometry.cache_size * (1 - self.cut)) - geometry.key_scales
        # n channels of b bits, and n numbers of every token that stays unquantised
        whole = 16 * self._unquantised
        return int(self.channel_bits(geometry, 0) / (float(self.bits) * (1 - self._residual) + whole))

    @property
    def _residual(self) -> float:
        """Share of a cache's tokens that its latest ones are."""
        return self.residual_length / self.context

    @property
    def _unquantised(self) -> float:
        """Tokens that stay unquantised, a token of the cache."""
        return (SINKS + self.residual_length) / self.context

    def channel_bits(self, geometry: Geometry, channels: int) -> float:
        """Bits that `reduction` leaves for a token's codes in one layer of so many channels.

        ValueError where everything else that the cache holds takes more than it leaves.
        """
        numbers = geometry.cache_size * (1 - self.cut) - geometry.key_scales
        left = (
            16
            * (numbers - (channels + geometry.key_scales) * self._unquantised)
            / ((1 - self._residual) if channels else 1)
        )
        if left < RUN:
            raise ValueError(
                f"reduction={self.cut} leaves nothing for a token's codes: of {geometry.cache_size} numbers in 16 bits "
                f"a cache of {self.context} tokens keeps {numbers:.1f} a token, and its unquantised tokens"
                + (f" and {geometry.key_scales} scales of keys" if geometry.key_scales else "")
                + " take those; ask for a smaller reduction, a longer context or a smaller kv_lora_rank"
            )
        return left

    def _share_of_budget(self, geometry: Geometry) -> int:
        """A quarter of R + r, up to a third where that is less than an eighth of the keys, in whole eights where they
        are so many: fewer pairs lose what reconstruction cannot give back, more cost it rank (docs/log.md).

        For evenly spaced frequencies all of them or a half, a fourth, …, up to half of R + r (64 + 56 of 120 in
        TransMLA's case is within rounding).
        """
        budget = self._budget(geometry) if self.kv_lora_rank is None else self.kv_lora_rank * 3 // 2
        if self.partial_rope != "evenly-spaced":
            share = max(budget // 4, min(geometry.key_size // 8, budget // 3))
            share = min(share, geometry.rotary_size)
            return share // 8 * 8 if share >= 8 else max(2, share // 2 * 2)
        size = 2 * geometry.num_pairs
        while size > max(2, 0.55 * budget) and size % 4 == 0:
            size //= 2
        return size

    def _rank(self, geometry: Geometry, rope_dim: int) -> int:
        if self.kv_lora_rank is not None:
            return self.kv_lora_rank
        budget = self._budget(geometry)
        rank = min(budget - rope_dim, geometry.full_rank(rope_dim, self.low_rank))
        if rank < 1:
            raise ValueError(
                f"reduction={self.cut} leaves {budget} numbers a token a layer, which rope_dim={rope_dim} "
                "alone uses up; ask for a smaller reduction or a smaller rope_dim"
            )
        return rank - rank % 2

"""The format of a latent cache: how many bits every cached channel of every layer takes, and what its codes mean.

A code c of b bits stands for `minimum + scale * c`, c in 0..2^b - 1. minimum and scale are tables, one number a
channel, saved with the weights: they cost no byte a token. With `scales="token"` a run's scales are multiplied by one
number a token, stored with its codes. A channel of 0 bits is its minimum for every token, one of 16 bits is kept as it
is. The first tokens of a sequence, whose states are far larger than all others', stay unquantised.

Keys have a large mean, and rotation spreads it over a channel's whole range. So a rotated key is kept as its difference
from the mean key rotated likewise, which its position alone tells: on SmolLM2 that is worth a bit a channel.

`config.cache_format` holds it as JSON does: {"scales", "sink_length", "residual_length", "bits": [[[b, count], ...] or
None for every layer]}, run lengths over the r + R channels, latent before rotated key.

Quantised here is what windows and training see; quantized_cache_mla.py holds the same numbers in packed bytes.
Shapes: B batch, S tokens, n = r + R channels; N rotated keys of P numbers, R = N * P.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .packing_mla import packed_bytes

BITS = (0, 1, 2, 3, 4, 6, 8, 16)
SCALES = ("table", "token")
SMALLEST = 2.0**-14  # factor of a token: half precision holds it in full


@dataclass(frozen=True)
class LayerFormat:
    """One layer's: bits of its channels, [r + R], the last `rope_dim` of them the rotated key's; how scales are kept;
    tokens that stay unquantised."""

    bits: tuple[int, ...]
    scales: str = "table"
    sink_length: int = 4
    residual_length: int = 0
    rope_dim: int = 0

    @property
    def rank(self) -> int:
        """r: channels of the latent."""
        return len(self.bits) - self.rope_dim

    @cached_property
    def runs(self) -> list[tuple[int, list[int]]]:
        """Channels of every number of bits, most bits first."""
        found = sorted(set(self.bits), reverse=True)
        return [(bits, [place for place, own in enumerate(self.bits) if own == bits]) for bits in found]

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of a token: codes of latent and rotated key, each in whole bytes, its factors, channels of 16 bits."""
        codes = packed_bytes(self.bits[: self.rank]) + packed_bytes(self.bits[self.rank :])
        return codes + 2 * (self.bits.count(16) + max(self.factors, default=-1) + 1)

    @cached_property
    def levels(self) -> list[int]:
        """Highest code of every channel, [r + R]; 0 where there is none."""
        return [0 if bits == 16 else 2**bits - 1 for bits in self.bits]

    @cached_property
    def factors(self) -> list[int]:
        """Which of a token's factors multiplies every channel's scale, [r + R]; -1 where none does."""
        coded = [] if self.scales == "table" else [bits for bits, _ in self.runs if bits not in (0, 16)]
        return [coded.index(bits) if bits in coded else -1 for bits in self.bits]


def layer_format(config: Any, index: int) -> LayerFormat | None:
    """The format of layer `index`; None where its cache is not quantised. ValueError where it does not fit."""
    given = getattr(config, "cache_format", None)
    if not given or given["bits"][index] is None:
        return None
    bits = tuple(bits for bits, count in given["bits"][index] for _ in range(count))
    ranks = config.layer_kv_lora_rank
    channels = (config.kv_lora_rank if ranks is None else ranks[index]) + config.rope_dim
    if len(bits) != channels:
        raise ValueError(f"cache_format: layer {index} has bits for {len(bits)} channels and caches {channels}")
    if unknown := sorted(set(bits) - set(BITS)):
        raise ValueError(f"cache_format: layer {index} has channels of {unknown[0]} bits; choose of {BITS}")
    if given["scales"] not in SCALES:
        raise ValueError(f"cache_format: scales={given['scales']!r} is unknown; choose one of: {', '.join(SCALES)}")
    return LayerFormat(bits, given["scales"], given["sink_length"], given["residual_length"], config.rope_dim)


def layer_formats(config: Any) -> list[LayerFormat]:
    """The formats of all layers that have one."""
    forms = (layer_format(config, index) for index in range(config.num_hidden_layers))
    return [form for form in forms if form is not None]


def mean_bits(config: Any) -> float:
    """Bits of a token's codes a layer, in the mean over the layers that have a format."""
    forms = layer_formats(config)
    return sum(sum(form.bits) for form in forms) / len(forms)


def layer_bytes(form: LayerFormat, key_scales: int, context: int) -> int:
    """Bytes that one layer's cache holds for a sequence of `context` tokens: codes of all tokens but the latest; tokens
    that stay unquantised, and scales of keys, at two bytes a number."""
    coded = form.code_bytes + 2 * key_scales
    unquantised = form.sink_length + form.residual_length
    return coded * (context - form.residual_length) + 2 * (len(form.bits) + key_scales) * unquantised


def format_bytes(config: Any, context: int) -> int:
    """Bytes that the latent layers of a model with a format hold for a sequence of `context` tokens, in 16-bit numbers.

    What the cache keeps beside its layers, cosine and sine of every position, is not in it: a table of the model's that
    all layers and sequences share, as serving engines have it. Raises ValueError for a model without a format.
    """
    forms = layer_formats(config)
    if not forms:
        raise ValueError("the model has no cache format: its cache holds r + R numbers a token a layer")
    return sum(layer_bytes(form, config.key_scales, context) for form in forms)


def run_lengths(bits: list[int]) -> list[list[int]]:
    """[[bits, count], ...] of bits a channel."""
    found: list[list[int]] = []
    for own in bits:
        if found and found[-1][0] == own:
            found[-1][1] += 1
        else:
            found.append([own, 1])
    return found


class CacheTables(nn.Module):
    """What a layer's codes mean, and its channels as their codes give them back.

    minimum, scale: [r + R], and key_mean [N, P], before rotation; learned with the weights where those of the attention
    are: rounding passes gradients straight through, clipping stops them (LSQ, arXiv 1902.08153, section 2.1).
    """

    def __init__(self, form: LayerFormat, rope_heads: int, rope_size: int) -> None:
        super().__init__()
        self.form = form
        channels = len(form.bits)
        self.minimum = nn.Parameter(torch.zeros(channels))
        self.scale = nn.Parameter(torch.ones(channels))
        self.key_mean = nn.Parameter(torch.zeros(rope_heads, rope_size))

    def forward(self, states: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """States [B, 1, S, n] as their codes give them back, those of the first tokens unchanged."""
        wide = states.float()
        minimum, scale = self.spans(self.factors(wide))
        place = place_of(wide, minimum, scale, self.levels)
        codes = place + (place.round() - place).detach()
        whole = torch.tensor([bits == 16 for bits in self.form.bits], device=states.device)
        found = torch.where(whole, wide, minimum + scale * codes)
        return torch.where(self.is_first(states, position_ids), states, found.to(states.dtype))

    @property
    def levels(self) -> torch.Tensor:
        """Highest code of every channel, [n]."""
        return torch.tensor(self.form.levels, dtype=torch.float32, device=self.minimum.device)

    def factors(self, states: torch.Tensor) -> torch.Tensor | None:
        """What multiplies the scales of every run of a token, [..., k] of states [..., n] in float32, if anything."""
        if self.form.scales == "table":
            return None
        minimum, scale = self.minimum.float(), self.scale.float()
        own = [
            token_factor(states[..., channels], minimum[channels], scale[channels], bits)
            for bits, channels in self.form.runs
            if bits not in (0, 16)
        ]
        return torch.cat(own, -1) if own else None

    def spans(self, factors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """minimum and scale of every channel, [n], or with factors [..., k] of every token's, [..., n]."""
        minimum, scale = self.minimum.float(), self.scale.float()
        if factors is None:
            return minimum, scale
        index = torch.tensor(self.form.factors, device=scale.device)
        # Channels without a factor take the one behind the last.
        factor = nn.functional.pad(factors, (0, 1), value=1.0)[..., index]
        half = self.levels / 2
        return minimum + scale * half * (1 - factor), scale * factor

    def is_first(self, states: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Which tokens stay unquantised, [B or 1, 1, S, 1]."""
        if position_ids is None:
            position_ids = torch.arange(states.shape[2], device=states.device)[None]
        return (position_ids < self.form.sink_length)[:, None, :, None]


def place_of(states: torch.Tensor, minimum: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Where states lie on the scale of their codes, not rounded."""
    return torch.minimum(((states - minimum) / scale).clamp_min(0), levels)


def token_factor(states: torch.Tensor, minimum: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """What multiplies a run's scales for every token, [..., 1], in half precision as it is stored: the run's largest
    distance from the middle of its tables, in halves of them."""
    half = scale * (2**bits - 1) / 2
    far = ((states - (minimum + half)).abs() / half).amax(-1, keepdim=True)
    return far.clamp_min(SMALLEST).half().float()

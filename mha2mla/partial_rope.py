"""Which rotary pairs keep their rotation.

A layer's pairs are laid out as [F, G]: frequency f (0 turns fastest) by component j of the basis that the key heads
are seen in (mha2mla/basis.py; with `rope_basis=heads` component j is key head j). A strategy takes a `Pairs` and
returns a boolean [F, G] with R / 2 pairs kept. Selected with `ConversionOptions.partial_rope`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mha2mla.options import Geometry


@dataclass
class Pairs:
    """What a selection may look at. Moments are None where there is no calibration text.

    count: R / 2, pairs to keep.
    key_energy, query_energy: [F, G], E‖k‖² of every pair in the basis, and E‖q‖² summed over the query heads.
    key_norm, query_norm: [F, G], E‖k‖ and the query heads' summed E‖q‖ of every pair of every key head.
    turn: [F, G], how much a score's phase varies over the context (`rotation_loss`).

    With frequency folding F counts blocks of m frequencies, and G the m times as many components of a block.
    """

    geometry: Geometry
    count: int
    turn: torch.Tensor | None = None
    key_energy: torch.Tensor | None = None
    query_energy: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    query_norm: torch.Tensor | None = None

    @property
    def per_head(self) -> int:
        return self.count // self.geometry.num_kv_heads

    def of_frequencies(self, frequencies: torch.Tensor) -> torch.Tensor:
        """All components of these frequencies."""
        kept = torch.zeros(self.geometry.num_pairs, self.geometry.num_kv_heads, dtype=torch.bool)
        kept[frequencies] = True
        return kept


Selection = Callable[[Pairs], torch.Tensor]


def high(pairs: Pairs) -> torch.Tensor:
    """The fastest pairs of every head (MHA2MLA, arXiv 2502.14837, section 3.1: S_high)."""
    return pairs.of_frequencies(torch.arange(pairs.per_head))


def low(pairs: Pairs) -> torch.Tensor:
    """The slowest pairs of every head (S_low)."""
    number = pairs.geometry.num_pairs
    return pairs.of_frequencies(torch.arange(number - pairs.per_head, number))


def uniform(pairs: Pairs) -> torch.Tensor:
    """Evenly spaced pairs of every head, from the fastest on (S_uniform)."""
    number, kept = pairs.geometry.num_pairs, pairs.per_head
    if number % kept:
        raise ValueError(
            f"partial_rope=uniform spaces pairs evenly: {kept} kept pairs a head (rope_dim="
            f"{2 * pairs.count}) do not divide its {number}"
        )
    return pairs.of_frequencies(torch.arange(0, number, number // kept))


def two_norm(pairs: Pairs) -> torch.Tensor:
    """The pairs of each head with the largest E‖q‖·E‖k‖, query heads of a group added (S_2-norm)."""
    assert pairs.key_norm is not None and pairs.query_norm is not None
    best = (pairs.query_norm * pairs.key_norm).topk(pairs.per_head, dim=0).indices.cpu()
    kept = torch.zeros(pairs.geometry.num_pairs, pairs.geometry.num_kv_heads, dtype=torch.bool)
    return kept.scatter_(0, best, True)


def evenly_spaced(pairs: Pairs) -> torch.Tensor:
    """The strongest component of evenly spaced frequencies (TransMLA, arXiv 2502.07864, section 4.2).

    Where there are more pairs than frequencies, whole components: the only choice that a native DeepSeek model,
    whose one rotated key has a grid of frequencies, can express.
    """
    number, count = pairs.geometry.num_pairs, pairs.count
    kept = torch.zeros(number, pairs.geometry.num_kv_heads, dtype=torch.bool)
    if count % number and number % count:
        raise ValueError(
            f"partial_rope=evenly-spaced keeps every n-th of {number} frequencies or whole components of them all: "
            f"rope_dim={2 * count} gives {count} pairs; choose a divisor or a multiple of {2 * number}"
        )
    kept[:: max(1, number // count), : max(1, count // number)] = True
    return kept


def rotation_cost(pairs: Pairs) -> torch.Tensor:
    """The pairs whose lost rotation would change the scores most, of the whole layer.

    cost = E‖k‖² · Σ_h E‖q‖² · turn: low frequencies cost nothing, however much energy they carry.
    """
    assert pairs.key_energy is not None and pairs.query_energy is not None and pairs.turn is not None
    cost = pairs.key_energy * pairs.query_energy * pairs.turn
    kept = torch.zeros(cost.numel(), dtype=torch.bool)
    kept[cost.flatten().topk(pairs.count).indices.cpu()] = True
    return kept.view(cost.shape)


STRATEGIES: dict[str, Selection] = {
    "high": high,
    "low": low,
    "uniform": uniform,
    "2-norm": two_norm,
    "evenly-spaced": evenly_spaced,
    "rotation-cost": rotation_cost,
}
NEEDS_CALIBRATION = {"2-norm", "rotation-cost"}
TERMS = 40  # of a series whose terms fall by 0.4 or more: the rest is below float64's rounding


def mean_rotation(frequencies: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """E[exp(iΔθ)] over distances Δ = 0, 1, … with these weights: complex [F]."""
    distances = torch.arange(len(weights), dtype=torch.float64, device=frequencies.device)
    angles = frequencies.double()[:, None] * distances
    weights = weights.to(angles) / weights.sum()
    return torch.polar(torch.ones_like(angles), angles) @ weights.to(torch.complex128)


def rotation_loss(frequencies: torch.Tensor, context: int) -> torch.Tensor:
    """E[2 − 2 cos Δθ] of every frequency, [F], over distances up to `context` with weights 1 / (1 + Δ).

    ValueError for a context of no tokens.
    """
    if context < 1:
        raise ValueError(f"a context of {context} tokens (max_position_embeddings) has no distances to rotate over")
    angles = torch.cat((frequencies.double(), frequencies.new_zeros(1, dtype=torch.float64)))
    sums = harmonic_sums(angles, context)
    return (2 - 2 * (sums[:-1] / sums[-1].real).real).float()


def harmonic_sums(angles: torch.Tensor, count: int) -> torch.Tensor:
    """Σ exp(i(n − 1)θ) / n over n = 1 … count, complex [F], in some log₂(count) steps and to float64's rounding.

    In a block of 2^s numbers from a ≥ 2^s on, with centre c and n = c (1 + r u), r ≤ 0.4 and |u| < 1, the factor 1 / n
    is the series of (−r u)^k / c, and the moments Σ u^k exp(ijθ) of a block follow from those of its halves.
    """
    moments = moments_of_blocks(angles, count.bit_length())
    total, start = torch.zeros_like(angles, dtype=torch.complex128), 1
    while start <= count:
        size = min(start, count + 1 - start).bit_length() - 1
        centre = start + (2**size - 1) / 2
        series = (-(2**size) / (2 * centre)) ** torch.arange(TERMS, dtype=torch.float64, device=angles.device)
        total += (
            torch.polar(torch.ones_like(angles), angles * (start - 1)) * (series.to(total) @ moments[size]) / centre
        )
        start += 2**size
    return total


def moments_of_blocks(angles: torch.Tensor, number: int) -> list[torch.Tensor]:
    """Σ u^k exp(ijθ) over j = 0 … 2^s − 1, complex [TERMS, F], for so many s from 0 on; u runs from −1 to 1 over j."""
    power = torch.arange(TERMS, dtype=torch.float64, device=angles.device)
    below = power[:, None] - power  # k − i; u^k of either half is ((u ∓ 1) / 2)^k, its binomial series in u^i
    choose = torch.lgamma(power + 1)[:, None] - torch.lgamma(power + 1) - torch.lgamma(below.clamp_min(0) + 1)
    right = torch.where(below >= 0, (choose - power[:, None] * math.log(2)).exp(), 0.0)
    left = torch.where(below % 2 == 0, right, -right)
    found = [torch.zeros(TERMS, len(angles), dtype=torch.complex128, device=angles.device)]
    found[0][0] = 1
    for size in range(number - 1):
        half = found[-1]
        turned = half * torch.polar(torch.ones_like(angles), angles * 2**size)
        found.append(left.to(half) @ half + right.to(half) @ turned)
    return found

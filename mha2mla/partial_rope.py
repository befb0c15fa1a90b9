"""Which rotary pairs keep their rotation.

A layer's pairs are laid out as [F, G]: frequency f (0 turns fastest) by component j of the basis that the key heads
are seen in (mha2mla/basis.py; with `rope_basis=heads` component j is key head j). A strategy takes a `Pairs` and
returns a boolean [F, G] with R / 2 pairs kept. Selected with `ConversionOptions.partial_rope`.
"""

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


def mean_rotation(frequencies: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """E[exp(iΔθ)] over distances Δ = 0, 1, … with these weights: complex [F]."""
    distances = torch.arange(len(weights), dtype=torch.float64, device=frequencies.device)
    angles = frequencies.double()[:, None] * distances
    weights = weights.to(angles) / weights.sum()
    return torch.polar(torch.ones_like(angles), angles) @ weights.to(torch.complex128)


def rotation_loss(frequencies: torch.Tensor, context: int) -> torch.Tensor:
    """E[2 − 2 cos Δθ] of every frequency, [F], over distances up to `context` with weights 1 / (1 + Δ)."""
    weights = 1 / (1 + torch.arange(context, dtype=torch.float64))
    return (2 - 2 * mean_rotation(frequencies, weights).real).float()

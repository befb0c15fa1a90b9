"""How the latents of all layers share one budget.

A strategy takes every layer's energies, the squared singular values of what is factored (mha2mla/low_rank.py), largest
first, and the mean rank; it returns a rank for each layer whose mean is that. Selected with
`ConversionOptions.rank_allocation`.

All but `uniform` hand out the budget two directions at a time, always to the layer that gains most, and leave every
layer between LEAST and MOST of the mean: without bounds they starve single layers, and conversions get worse.
"""

from collections.abc import Callable

import torch

LEAST, MOST = 0.6, 1.6

Allocation = Callable[[list[torch.Tensor], int], list[int]]
Gain = Callable[[torch.Tensor, int], float]  # of more directions, from the energy lost after every rank, and a rank


def uniform(energies: list[torch.Tensor], rank: int) -> list[int]:
    """The same rank in every layer."""
    return [rank] * len(energies)


def energy(energies: list[torch.Tensor], rank: int) -> list[int]:
    """Smallest sum of the layers' relative errors, the root of the share of energy that is lost."""
    return greedy(energies, rank, lambda lost, at: share(lost, at) - share(lost, at + 2))


def share(lost: torch.Tensor, at: int) -> float:
    """Relative error at rank `at`; 0 in a layer of zeros."""
    return float((lost[at] / lost[0].clamp_min(1e-300)).sqrt())


def care(energies: list[torch.Tensor], rank: int) -> list[int]:
    """To the layer whose next direction is the largest share of what it still loses (CARE, arXiv 2603.17946)."""
    return greedy(energies, rank, lambda lost, at: float((lost[at] - lost[at + 1]) / lost[at].clamp_min(1e-30)))


def greedy(energies: list[torch.Tensor], rank: int, gain: Gain) -> list[int]:
    """Two directions at a time to the layer with the largest gain."""
    lost = [torch.cat((tail.flip(0).cumsum(0).flip(0), tail.new_zeros(2))) for tail in energies]
    most = [min(int(MOST * rank), len(tail)) for tail in energies]
    ranks = [max(1, int(LEAST * rank))] * len(energies)
    left = rank * len(energies) - sum(ranks)
    while left:
        open_layers = [layer for layer, at in enumerate(ranks) if at < most[layer]]
        if not open_layers:  # every layer is full
            break
        needy = max(open_layers, key=lambda layer: gain(lost[layer], ranks[layer]))
        step = min(2, left, most[needy] - ranks[needy])
        ranks[needy] += step
        left -= step
    return ranks


STRATEGIES: dict[str, Allocation] = {"uniform": uniform, "energy": energy, "care": care}
NEEDS_CALIBRATION: set[str] = set()

"""Which rotary pairs of each key head keep their rotation (MHA2MLA, arXiv 2502.14837, section 3.1).

A strategy takes (geometry, pairs a head, layer statistics or None) and returns the kept pairs' indices,
[G, pairs], ascending. Pair 0 turns fastest. Selected with `ConversionOptions.partial_rope`.
"""

from collections.abc import Callable

import torch

from mha2mla.options import Geometry
from mha2mla.statistics import LayerStatistics

Selection = Callable[[Geometry, int, LayerStatistics | None], torch.Tensor]


def high(geometry: Geometry, pairs: int, statistics: LayerStatistics | None = None) -> torch.Tensor:
    """The fastest pairs of every head (S_high)."""
    return torch.arange(pairs).repeat(geometry.num_kv_heads, 1)


def low(geometry: Geometry, pairs: int, statistics: LayerStatistics | None = None) -> torch.Tensor:
    """The slowest pairs of every head (S_low)."""
    return torch.arange(geometry.num_pairs - pairs, geometry.num_pairs).repeat(geometry.num_kv_heads, 1)


def uniform(geometry: Geometry, pairs: int, statistics: LayerStatistics | None = None) -> torch.Tensor:
    """Evenly spaced pairs of every head, from the fastest on (S_uniform)."""
    if geometry.num_pairs % pairs:
        raise ValueError(
            f"partial_rope=uniform spaces pairs evenly: {pairs} kept pairs a head (rope_dim="
            f"{2 * pairs * geometry.num_kv_heads}) do not divide its {geometry.num_pairs}"
        )
    return torch.arange(0, geometry.num_pairs, geometry.num_pairs // pairs).repeat(geometry.num_kv_heads, 1)


def two_norm(geometry: Geometry, pairs: int, statistics: LayerStatistics | None) -> torch.Tensor:
    """The pairs of each head with the largest E‖q‖·E‖k‖, query heads of a group added (S_2-norm)."""
    assert statistics is not None, "convert() refuses strategies that need calibration without any"
    query = statistics.query_norm.unflatten(0, (geometry.num_kv_heads, -1)).sum(1)
    return (query * statistics.key_norm).topk(pairs, dim=-1).indices.sort(dim=-1).values.cpu()


STRATEGIES: dict[str, Selection] = {"high": high, "low": low, "uniform": uniform, "2-norm": two_norm}
NEEDS_CALIBRATION = {"2-norm"}

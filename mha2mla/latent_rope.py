"""Layers whose one rotated key comes out of the latent (rope=latent).

The latent is that of rope=full: un-rotated keys whole, and values. What makes keys of it is then cut, as rope=partial
cuts the keys themselves, into what rotates and what does not; both cuts are linear, so they may come in either order.
Shapes as in mha2mla/layer.py, with N = 1.
"""

from collections.abc import Callable

import torch

from mha2mla.options import ConversionOptions, Geometry
from mha2mla.projections import Projections
from mha2mla.rotation import Rotation, as_pairs, choose_pairs, shared_key, shares, turned
from mha2mla.statistics import LayerStatistics

# Rows [G, D, r] of keys to those that do not rotate, [G, D, r], and those of the rotated key, [P, r].
SplitKeys = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def cut(
    whole: Projections,
    geometry: Geometry,
    options: ConversionOptions,
    rotation: Rotation,
    statistics: LayerStatistics | None,
    moment: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], SplitKeys]:
    """Queries [H * (D + P), d + 1], the state of all that is not factored, and how keys are split.

    moment: [d + 1, d + 1] of the layer's input, if it is known.
    """
    turning, fold = 2 * geometry.num_pairs, options.frequency_folding
    query, key = as_pairs(whole.query[:, :turning]), as_pairs(whole.key[:, :turning])
    choice = choose_pairs(query, key, geometry, options, rotation, statistics, moment)
    scaled = query * rotation.scale**2  # keys rotate without the factor that RoPE scaling puts on cos and sin
    rest = turned(scaled, rotation.near) if options.expected_rotation else scaled
    rotated, index = shares(scaled, len(key), choice, fold)

    def split_keys(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        still, turned_key = shared_key(as_pairs(rows[:, :turning]), choice, fold)
        return torch.cat((still, rows[:, turning:]), dim=1), turned_key

    queries = torch.cat((rest.flatten(1, 2), whole.query[:, turning:], rotated), dim=1).flatten(0, 1)
    state = {
        "rope_pair_index": torch.zeros(1, 0, dtype=torch.int64),
        "rope_frequencies": rotation.frequencies[index.to(rotation.frequencies.device)].float().view(torch.int32),
    }
    if whole.biased:
        state["q_proj.bias" if options.q_lora_rank is None else "q_b_proj.bias"] = queries[:, -1]
        # A bias on unrotated keys moves all scores of a query alike: softmax drops it.
        state["key_bias"] = split_keys(whole.key[..., -1:])[1][:, 0]
    return queries, state, split_keys

"""Layers whose queries and keys pass a norm before rotation (Qwen3, Gemma 3, OLMo 2): how their keys are cut.

A normed key is k̂ = w ⊙ k · s with a scale s = 1/√(mean k² + ε) for every token and key head, or for all heads at once.
The weight w folds into the up-projection; the scale rides in the cache, divided by its usual size so that latents and
scales are of the order of one. What rotates is taken from the normed key itself. That is exact, but every product of
the cache with a query has to be of one head: heads with scales of their own cannot be mixed by a basis.
Shapes as in mha2mla/layer.py.
"""

import torch

from mha2mla.options import ConversionOptions, Geometry
from mha2mla.projections import Projections
from mha2mla.rotation import Rotation, as_pairs, choose_pairs, left_over, turned
from mha2mla.statistics import LayerStatistics


def cut(
    whole: Projections,
    geometry: Geometry,
    options: ConversionOptions,
    rotation: Rotation,
    statistics: LayerStatistics | None,
    moment: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rows [G, D, d + 1] of keys that lost their rotation, without their scales, and the state of all that is kept."""
    norms = whole.norms
    assert norms is not None
    size = usual_size(whole.key, moment, norms.joint)  # [1] or [G]
    key = whole.key * norms.key[..., None] / size[:, None, None]
    turning = 2 * geometry.num_pairs
    pairs = as_pairs(key[:, :turning])
    choice = choose_pairs(as_pairs(whole.query[:, :turning]), pairs, geometry, options, rotation, statistics, moment)
    rest = torch.einsum("fgh,hcfi->gcfi", left_over(choice), pairs) * rotation.scale**2
    if options.expected_rotation:
        rest = turned(rest, rotation.near.conj())  # elsewhere the transposed rotation acts on the query
    frequency, component = choice.kept.nonzero().unbind(1)
    state = {
        "q_norm.weight": norms.query.flatten(),
        "k_norm.weight": norms.key.flatten(),
        "k_proj.weight": whole.key[..., :-1].flatten(0, 1),
        "key_size": size,
        "rope_mixing": choice.mixing[frequency, component],
        "rope_pair_index": frequency[None],
    }
    return torch.cat((rest.flatten(1, 2), key[:, turning:]), dim=1), state


def usual_size(key: torch.Tensor, moment: torch.Tensor | None, joint: bool) -> torch.Tensor:
    """Root mean square of the keys' numbers, over all heads [1] or of each [G]; without text, of inputs of unit size.

    To the nearest power of two, which weights of any precision hold exactly.
    """
    energy = key.square().sum(-1) if moment is None else torch.einsum("gdi,ij,gdj->gd", key, moment, key)
    mean = energy.mean()[None] if joint else energy.mean(1)
    return torch.exp2(mean.clamp_min(1e-30).log2().div(2).round())

"""Layers whose keys all lie un-rotated in the latent (rope=full): what is factored, and how the queries see its errors.

Shapes as in mha2mla/layer.py, with K = D and no rotated key.
"""

from dataclasses import dataclass

import torch

from mha2mla.normed import usual_size
from mha2mla.options import ConversionOptions, Geometry
from mha2mla.projections import Norms, Projections
from mha2mla.rotation import Rotation


@dataclass
class Parts:
    """query [H * D, d + 1], key [G, D, d + 1] divided by key_size [G], and the state of all that is not factored."""

    query: torch.Tensor
    key: torch.Tensor
    key_size: torch.Tensor
    state: dict[str, torch.Tensor]


def cut(
    whole: Projections,
    geometry: Geometry,
    options: ConversionOptions,
    rotation: Rotation,
    moment: torch.Tensor | None,
) -> Parts:
    """moment: [d + 1, d + 1] of the layer's input, if it is known."""
    factor = query_factor(rotation, geometry.head_dim).to(whole.query)
    query, key_size = whole.query, whole.key.new_ones(geometry.num_kv_heads)
    state = {
        "rope_pair_index": torch.zeros(1, 0, dtype=torch.int64),
        "rope_frequencies": rotation.frequencies.float().view(torch.int32),
    }
    if whole.norms is None:
        query = query * factor[:, None]
    else:
        # A norm makes all heads alike, however large their keys are, so their errors count relative to that.
        key_size = key_size * usual_size(whole.key, moment, whole.norms.joint)
        state |= {"q_norm.weight": (whole.norms.query * factor).flatten(), "k_norm.weight": whole.norms.key.flatten()}
    query = query.flatten(0, 1)
    if whole.biased:
        state["q_proj.bias" if options.q_lora_rank is None else "q_b_proj.bias"] = query[:, -1]
        bias = torch.stack((whole.key[..., -1], torch.zeros_like(whole.value[..., -1])), dim=1)
        state["kv_b_proj.bias"] = bias.flatten()
    return Parts(query, whole.key / key_size[:, None, None], key_size, state)


def query_factor(rotation: Rotation, size: int) -> torch.Tensor:
    """[D]: the factor that RoPE scaling puts on cos and sin, of query and of key, where a head rotates."""
    factor = torch.ones(size)
    factor[: 2 * len(rotation.frequencies)] = rotation.scale**2
    return factor


def seen_by_keys(moment: torch.Tensor, norms: Norms | None, rotation: Rotation) -> torch.Tensor:
    """From E[q qᵀ] of the queries that meet a group's keys, before rotation, that of an un-rotated key's error, both
    [G, D, D]: averaged over rotations, and through the weight of a norm on keys."""
    factor = query_factor(rotation, moment.shape[-1]).to(moment)
    seen = over_rotations(moment * factor * factor[:, None], rotation.frequencies)
    return seen if norms is None else seen * norms.key[:, None] * norms.key[:, :, None]


def over_rotations(moment: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Mean of Rᵀ M R over all angles of every pair, each on its own: M [G, D, D], frequencies [F].

    Of a pair only its energy is left, the same on both numbers; what does not rotate stays as it is.
    """
    size = 2 * len(frequencies)
    still = torch.ones(moment.shape[-1], dtype=torch.bool, device=moment.device)
    still[:size] = (frequencies == 0).repeat(2).to(moment.device)
    energy = moment.diagonal(dim1=1, dim2=2).clone()
    energy[:, :size] = energy[:, :size].unflatten(1, (2, -1)).mean(1).repeat(1, 2)
    return torch.where(still[:, None] & still, moment, torch.diag_embed(energy))

"""Keys that lie un-rotated in the latent (rope=full, rope=latent): what is factored, and how queries see its errors.

Shapes as in mha2mla/layer.py, with K = D and no rotated key.
"""

from dataclasses import dataclass

import torch

from mha2mla.normed import usual_size
from mha2mla.options import ConversionOptions, Geometry
from mha2mla.projections import Norms, Projections
from mha2mla.rotation import Rotation

FARTHEST = 512  # tokens; distances that errors of keys are weighed over: most attention is near


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
        state["key_bias"] = whole.key[..., -1].flatten()
    return Parts(query, whole.key / key_size[:, None, None], key_size, state)


def query_factor(rotation: Rotation, size: int) -> torch.Tensor:
    """[D]: the factor that RoPE scaling puts on cos and sin, of query and of key, where a head rotates."""
    factor = torch.ones(size)
    factor[: 2 * len(rotation.frequencies)] = rotation.scale**2
    return factor


def seen_by_keys(moment: torch.Tensor, norms: Norms | None, rotation: Rotation) -> torch.Tensor:
    """From E[q qᵀ] of the queries that meet a group's keys, before rotation, that of an un-rotated key's error, both
    [G, D, D]: in the mean over distances, and through the weight of a norm on keys."""
    factor = query_factor(rotation, moment.shape[-1]).to(moment)
    seen = over_distances(moment * factor * factor[:, None], rotation)
    return seen if norms is None else seen * norms.key[:, None] * norms.key[:, :, None]


def over_distances(moment: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """E[R(-Δθ)ᵀ M R(-Δθ)] of M [G, D, D] over distances Δ with weights ∝ 1 / (1 + Δ).

    Of pairs that turn fast only the energy is left, the same on both numbers; slow ones keep their direction, and what
    is common to two that turn alike.
    """
    size, pairs = moment.shape[-1], len(rotation.frequencies)
    still = torch.zeros(size - 2 * pairs, dtype=torch.float64)
    frequencies = rotation.frequencies.double().cpu()
    phases = torch.cat((frequencies, -frequencies, still))
    distances = torch.arange(min(rotation.context, FARTHEST), dtype=torch.float64)
    turns = torch.exp(-1j * distances[:, None] * phases)
    weights = 1 / (1 + distances)
    mean = (turns.conj() * (weights / weights.sum())[:, None]).T @ turns
    # In this basis a rotation is diagonal.
    one = torch.eye(pairs, dtype=torch.complex128) / 2**0.5
    basis = torch.block_diag(
        torch.cat((torch.cat((one, one), 1), torch.cat((-1j * one, 1j * one), 1))), torch.eye(len(still))
    )
    basis, mean = basis.to(moment.device), mean.to(moment.device)
    inner = basis.mH @ moment.to(basis.dtype) @ basis
    return (basis @ (inner * mean) @ basis.mH).real.to(moment.dtype)

"""One attention layer's weights, from q/k/v/o projections to those of latent attention.

Shapes: d hidden size, H query heads, G key/value heads, D head size, F = D / 2 rotary pairs (pair f is the
numbers f and f + F of a head), p kept pairs a head, K = D - 2p, r latent size.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mha2mla import low_rank, partial_rope
from mha2mla.options import ConversionOptions, Geometry
from mha2mla.statistics import LayerStatistics


@dataclass
class LayerReport:
    """Relative Frobenius errors of one layer's factored weights; on activations: weighted by E[x xᵀ]^½."""

    key_error: float
    value_error: float
    activation_error: float | None
    rotated_pairs: list[list[int]]


def convert_layer(
    attention: Any,
    geometry: Geometry,
    options: ConversionOptions,
    rope_scale: float,
    statistics: LayerStatistics | None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, torch.Tensor], LayerReport]:
    """State of an `MLAAttention` that stands for `attention`, and how much the factoring lost.

    rope_scale: factor that RoPE scaling puts on cos and sin; pairs that no longer pass through the rotary embedding
        keep it by a factor rope_scale² on their queries.
    """
    dtype = dtype or attention.q_proj.weight.dtype
    heads, groups, size = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    assert options.rope_dim is not None and options.kv_lora_rank is not None
    pairs = options.rope_dim // (2 * groups)
    kept = partial_rope.STRATEGIES[options.partial_rope](geometry, pairs, statistics)
    rotated, rest = head_rows(kept, geometry)

    w_query, b_query = rows_of(attention.q_proj, heads, size)
    w_key, b_key = rows_of(attention.k_proj, groups, size)
    w_value, b_value = rows_of(attention.v_proj, groups, size)

    per_head = heads // groups
    order = torch.cat((rest, rotated), dim=1).repeat_interleave(per_head, 0)
    scale = torch.ones(size, 1, device=w_query.device)
    scale[: rest.shape[1]] = rope_scale**2
    w_query = take(w_query, order) * scale
    key_rest, key_rotated = take(w_key, rest).flatten(0, 1), take(w_key, rotated).flatten(0, 1)
    stacked_value = w_value.flatten(0, 1)

    down, up = low_rank.STRATEGIES[options.low_rank](key_rest, stacked_value, options.kv_lora_rank)
    up_key, up_value = up.split([key_rest.shape[0], stacked_value.shape[0]])
    up_heads = torch.cat((up_key.unflatten(0, (groups, -1)), up_value.unflatten(0, (groups, -1))), dim=1)

    state = query_state(w_query.flatten(0, 1), options.q_lora_rank)
    state["kv_a_proj_with_mqa.weight"] = torch.cat((down, key_rotated))
    state["kv_b_proj.weight"] = up_heads.flatten(0, 1)
    state["o_proj.weight"] = attention.o_proj.weight.detach()
    if b_query is not None and b_key is not None and b_value is not None:
        last = "q_proj" if options.q_lora_rank is None else "q_b_proj"
        state[f"{last}.bias"] = (take(b_query, order) * scale).flatten()
        # A bias on unrotated keys is the same for every key and moves all scores of a query alike: softmax drops it.
        rotated_bias = take(b_key, rotated).flatten()
        state["kv_a_proj_with_mqa.bias"] = torch.cat((rotated_bias.new_zeros(options.kv_lora_rank), rotated_bias))
        # A value bias comes through attention unchanged, since its weights sum to one: it belongs to the output.
        passed = attention.o_proj.weight.detach().float() @ b_value.repeat_interleave(per_head, 0).flatten()
        state["o_proj.bias"] = passed if attention.o_proj.bias is None else passed + attention.o_proj.bias.detach()
    state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    state["rope_pair_index"] = kept.to(w_query.device)

    weight = torch.cat((key_rest, stacked_value))
    difference = weight - up @ down
    return state, LayerReport(
        key_error=relative(difference[: len(key_rest)], key_rest),
        value_error=relative(difference[len(key_rest) :], stacked_value),
        activation_error=None if statistics is None else weighted(difference, weight, statistics.input_moment),
        rotated_pairs=kept.tolist(),
    )


def rows_of(projection: Any, heads: int, size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [heads, D, d] and bias [heads, D, 1] of a projection, float32."""
    weight = projection.weight.detach().float().view(heads, size, -1)
    bias = None if projection.bias is None else projection.bias.detach().float().view(heads, size, 1)
    return weight, bias


def head_rows(kept: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of each key head that keep rotating [G, 2p] and the others [G, K]; first components before second ones."""
    half = geometry.num_pairs
    chosen = torch.zeros(geometry.num_kv_heads, half, dtype=torch.bool).scatter_(1, kept, True)
    others = (~chosen).nonzero()[:, 1].view(geometry.num_kv_heads, -1)
    return torch.cat((kept, kept + half), dim=1), torch.cat((others, others + half), dim=1)


def take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """From rows [heads, D, n] those that index [heads, m] names, head by head: [heads, m, n]."""
    index = index.to(rows.device)[:, :, None].expand(-1, -1, rows.shape[-1])
    return rows.gather(1, index)


def query_state(weight: torch.Tensor, rank: int | None) -> dict[str, torch.Tensor]:
    """The query projection whole, or as two factors (DeepSeek-V2, section 2.1.2; no norm stands between them here)."""
    if rank is None:
        return {"q_proj.weight": weight}
    down, up = low_rank.truncated_svd(weight, rank)
    return {"q_a_proj.weight": down, "q_b_proj.weight": up}


def relative(difference: torch.Tensor, whole: torch.Tensor) -> float:
    """Frobenius norm of a difference relative to the whole; 0 where there is nothing."""
    return float(difference.norm() / whole.norm()) if whole.numel() else 0.0


def weighted(difference: torch.Tensor, whole: torch.Tensor, moment: torch.Tensor) -> float:
    """The same on real activations: ‖(W − Ŵ) x‖ against ‖W x‖ in the mean over x with moment E[x xᵀ]."""
    lost = ((difference @ moment) * difference).sum()
    return float((lost / ((whole @ moment) * whole).sum()).clamp_min(0).sqrt())

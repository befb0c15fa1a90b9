"""One attention layer's weights, from q/k/v/o projections to those of latent attention.

Shapes: d hidden size, H query heads, G key/value heads, D head size, F = D / 2 rotary pairs (pair f is the numbers
f and f + F of a head), N rotated keys, P numbers of each, K unrotated numbers of a head, r latent size.
Biases ride along as one more input: weights here are [..., d + 1] until they are written out.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mha2mla import low_rank
from mha2mla.options import ConversionOptions, Geometry
from mha2mla.rotation import Parts, Rotation, choose_rotation
from mha2mla.statistics import LayerStatistics


@dataclass
class LayerReport:
    """Relative Frobenius errors of one layer's factored weights; on activations: weighted by E[x xᵀ]^½."""

    kv_lora_rank: int
    key_error: float
    value_error: float
    activation_error: float | None
    rotated_pairs: list[list[int]]


@dataclass
class LayerCut:
    """A layer before it is factored: its rows [heads, D, d + 1], what rotates of them and what does not."""

    parts: Parts
    stack: low_rank.Stack
    value: torch.Tensor  # [G, D, d + 1]
    output: torch.Tensor  # [d, H * D]
    moment: torch.Tensor | None  # [d + 1, d + 1]


def cut_layer(
    attention: Any,
    geometry: Geometry,
    options: ConversionOptions,
    rotation: Rotation,
    statistics: LayerStatistics | None,
) -> LayerCut:
    """A layer's weights in the chosen basis, split into rotated pairs and the stack that becomes the latent."""
    heads, groups, size = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    assert options.kv_lora_rank is not None
    query, key = rows_of(attention.q_proj, heads, size), rows_of(attention.k_proj, groups, size)
    value, output = rows_of(attention.v_proj, groups, size), attention.o_proj.weight.detach().float()
    moment = None if statistics is None else input_moment(statistics)
    parts = choose_rotation(query, key, geometry, options, rotation, statistics, moment)
    key_rest, value_rest = parts.key_rest[..., :-1], value[..., :-1]
    stack = low_rank.Stack(key_rest, value_rest, options.kv_lora_rank, value_weight=options.value_weight)
    if moment is not None:
        stack.input_moment = moment[:-1, :-1]
        stack.query_moment = by_group(head_moments(parts.query_rest, moment), groups)
        stack.output_gram = by_group(head_grams(output, heads), groups)
    return LayerCut(parts, stack, value, output, moment)


def convert_layer(
    attention: Any,
    geometry: Geometry,
    options: ConversionOptions,
    rotation: Rotation,
    statistics: LayerStatistics | None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, torch.Tensor], LayerReport]:
    """State of an `MLAAttention` that stands for `attention`, and how much the factoring lost."""
    dtype = dtype or attention.q_proj.weight.dtype
    heads, groups, size = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    assert options.kv_lora_rank is not None
    cut = cut_layer(attention, geometry, options, rotation, statistics)
    parts, stack, value, output, moment = cut.parts, cut.stack, cut.value, cut.output, cut.moment
    key_rest = stack.key
    down, up = low_rank.STRATEGIES[options.low_rank](stack)
    up_key, up_value = up.split([key_rest.shape[0] * key_rest.shape[1], groups * size])
    up_heads = torch.cat((up_key.unflatten(0, (groups, -1)), up_value.unflatten(0, (groups, -1))), dim=1)

    whole_query = torch.cat((parts.query_rest, parts.query_rotated), dim=1).flatten(0, 1)
    state = query_state(whole_query[:, :-1], options.q_lora_rank, moment)
    state["kv_a_proj_with_mqa.weight"] = torch.cat((down, parts.key_rotated[:, :-1]))
    state["kv_b_proj.weight"] = up_heads.flatten(0, 1)
    state["o_proj.weight"] = output
    if attention.q_proj.bias is not None:
        last = "q_proj" if options.q_lora_rank is None else "q_b_proj"
        state[f"{last}.bias"] = whole_query[:, -1]
        # A bias on unrotated keys is the same for every key and moves all scores of a query alike: softmax drops it.
        rotated_bias = parts.key_rotated[:, -1]
        state["kv_a_proj_with_mqa.bias"] = torch.cat((rotated_bias.new_zeros(options.kv_lora_rank), rotated_bias))
        # A value bias comes through attention unchanged, since its weights sum to one: it belongs to the output.
        passed = output @ value[..., -1].repeat_interleave(heads // groups, 0).flatten()
        state["o_proj.bias"] = passed if attention.o_proj.bias is None else passed + attention.o_proj.bias.detach()
    state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    state["rope_pair_index"] = parts.pair_index.to(output.device)

    weight = stack.rows
    difference = weight - up @ down
    keys = len(up_key)
    return state, LayerReport(
        kv_lora_rank=len(down),
        key_error=relative(difference[:keys], weight[:keys]),
        value_error=relative(difference[keys:], weight[keys:]),
        activation_error=None if stack.input_moment is None else weighted(difference, weight, stack.input_moment),
        rotated_pairs=parts.pair_index.tolist(),
    )


def rows_of(projection: Any, heads: int, size: int) -> torch.Tensor:
    """Weight and bias (zero if there is none) of a projection, [heads, D, d + 1] in float32."""
    weight = projection.weight.detach().float()
    bias = weight.new_zeros(len(weight)) if projection.bias is None else projection.bias.detach().float()
    return torch.cat((weight, bias[:, None]), dim=1).view(heads, size, -1)


def input_moment(statistics: LayerStatistics) -> torch.Tensor:
    """E[x xᵀ] with the constant 1 that biases multiply as x's last number, [d + 1, d + 1]."""
    mean = statistics.input_mean[:, None]
    return torch.cat(
        (torch.cat((statistics.input_moment, mean), dim=1), torch.cat((mean.T, mean.new_ones(1, 1)), dim=1))
    )


def head_moments(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """E[q qᵀ] of every head, [H, K, K], from its rows [H, K, d + 1]."""
    return rows @ moment @ rows.mT


def head_grams(output: torch.Tensor, heads: int) -> torch.Tensor:
    """W_Oᵀ W_O of every head's columns of the output projection, [H, V, V]."""
    columns = output.view(len(output), heads, -1).permute(1, 2, 0)
    return columns @ columns.mT


def by_group(matrices: torch.Tensor, groups: int) -> torch.Tensor:
    """Summed over the query heads of each key/value head: [H, n, n] to [G, n, n]."""
    return matrices.unflatten(0, (groups, -1)).sum(1)


def query_state(weight: torch.Tensor, rank: int | None, moment: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The query projection whole, or as two factors (DeepSeek-V2, section 2.1.2; no norm stands between them here).

    With statistics the factors fit the queries of real inputs, without them the weights.
    """
    if rank is None:
        return {"q_proj.weight": weight}
    if moment is None:
        down, up = low_rank.truncated_svd(weight, rank)
    else:
        down, up = low_rank.weighted_svd(weight, low_rank.Weights(moment[:-1, :-1], None), rank)
    return {"q_a_proj.weight": down, "q_b_proj.weight": up}


def relative(difference: torch.Tensor, whole: torch.Tensor) -> float:
    """Frobenius norm of a difference relative to the whole; 0 where there is nothing."""
    norm = float(whole.norm())
    return float(difference.norm()) / norm if norm else 0.0


def weighted(difference: torch.Tensor, whole: torch.Tensor, moment: torch.Tensor) -> float:
    """The same on real activations: ‖(W − Ŵ) x‖ against ‖W x‖ in the mean over x with moment E[x xᵀ]."""
    lost = ((difference @ moment) * difference).sum()
    return float((lost / ((whole @ moment) * whole).sum()).clamp_min(0).sqrt())

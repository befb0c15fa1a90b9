"""One attention layer's weights, from a family's projections to those of latent attention.

Shapes: d hidden size, H query heads, G key/value heads, D head size, F rotary pairs (pair f is the numbers f and f + F
of a head), N rotated keys, P numbers of each, K unrotated numbers of a head, r latent size.
Biases ride along as one more input: weights here are [..., d + 1] until they are written out.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mha2mla import full_rope, latent_rope, low_rank, normed
from mha2mla.options import ConversionOptions, Geometry
from mha2mla.projections import Projections, read_projections
from mha2mla.rotation import Rotation, choose_rotation
from mha2mla.statistics import LayerStatistics

State = dict[str, torch.Tensor]


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
    """A layer before it is factored: what becomes the latent, and the state of all that does not.

    query [H * (K + P), d + 1]; down_rows [R, d]: rotated keys, which follow the latent in one projection.
    key_size [G]: what the stack's keys are divided by, where it is not one. split_keys: what the latent's keys are cut
    into, where one of them rotates.
    """

    stack: low_rank.Stack
    query: torch.Tensor
    down_rows: torch.Tensor
    state: State
    key_size: torch.Tensor | None = None
    split_keys: latent_rope.SplitKeys | None = None


def cut_layer(
    attention: Any,
    geometry: Geometry,
    options: ConversionOptions,
    rotation: Rotation,
    statistics: LayerStatistics | None,
) -> LayerCut:
    """A layer's weights in the chosen basis, split into what rotates and the stack that becomes the latent."""
    return cut_projections(read_projections(attention, geometry), geometry, options, rotation, statistics)


def cut_projections(
    whole: Projections,
    geometry: Geometry,
    options: ConversionOptions,
    rotation: Rotation,
    statistics: LayerStatistics | None,
) -> LayerCut:
    groups = geometry.num_kv_heads
    assert options.kv_lora_rank is not None
    moment = None if statistics is None else input_moment(statistics)
    state: State
    if options.rope != "partial":
        return cut_late_rope(whole, geometry, options, rotation, statistics, moment)
    if whole.norms is None:
        parts = choose_rotation(whole.query, whole.key, geometry, options, rotation, statistics, moment)
        query = torch.cat((parts.query_rest, parts.query_rotated), dim=1).flatten(0, 1)
        key_rest, down_rows = parts.key_rest, parts.key_rotated[:, :-1]
        state = {"rope_pair_index": parts.pair_index}
        if whole.biased:
            last = "q_proj" if options.q_lora_rank is None else "q_b_proj"
            state[f"{last}.bias"] = query[:, -1]
            # A bias on unrotated keys moves all scores of a query alike: softmax drops it.
            rotated = parts.key_rotated[:, -1]
            state["kv_a_proj_with_mqa.bias"] = torch.cat((rotated.new_zeros(options.kv_lora_rank), rotated))
    else:
        key_rest, state = normed.cut(whole, geometry, options, rotation, statistics, moment)
        query, down_rows = whole.query.flatten(0, 1), whole.key.new_zeros(0, geometry.hidden_size)
    query_moment = None
    if statistics is not None and moment is not None:
        query_moment = statistics.query_moment
        if query_moment is None:
            query_moment = head_moments(parts.query_rest, moment)
        query_moment = by_group(query_moment, groups)
    return LayerCut(stack_of(key_rest, whole, options, moment, query_moment), query, down_rows, state)


def cut_late_rope(
    whole: Projections,
    geometry: Geometry,
    options: ConversionOptions,
    rotation: Rotation,
    statistics: LayerStatistics | None,
    moment: torch.Tensor | None,
) -> LayerCut:
    """All keys and values in the stack, nothing beside it."""
    query_moment = None
    if statistics is not None and moment is not None:
        query_moment = statistics.query_moment
        if query_moment is None:
            query_moment = head_moments(whole.query, moment)
        query_moment = full_rope.seen_by_keys(by_group(query_moment, geometry.num_kv_heads), whole.norms, rotation)
    beside = whole.key.new_zeros(0, geometry.hidden_size)
    if options.rope == "latent":
        query, state, split_keys = latent_rope.cut(whole, geometry, options, rotation, statistics, moment)
        stack = stack_of(whole.key, whole, options, moment, query_moment)
        return LayerCut(stack, query, beside, state, split_keys=split_keys)
    parts = full_rope.cut(whole, geometry, options, rotation, moment)
    stack = stack_of(parts.key, whole, options, moment, query_moment)
    return LayerCut(stack, parts.query, beside, parts.state, parts.key_size)


def stack_of(
    key: torch.Tensor,
    whole: Projections,
    options: ConversionOptions,
    moment: torch.Tensor | None,
    query_moment: torch.Tensor | None,
) -> low_rank.Stack:
    """Keys [G, K, d + 1] and the layer's values with the moments that are known."""
    assert options.kv_lora_rank is not None
    stack = low_rank.Stack(
        key[..., :-1], whole.value[..., :-1], options.kv_lora_rank, value_weight=options.value_weight
    )
    if moment is not None:
        heads, groups = len(whole.query), len(whole.key)
        stack.input_moment, stack.query_moment = moment[:-1, :-1], query_moment
        stack.output_gram = by_group(head_grams(whole.output, heads), groups)
    return stack


def convert_layer(
    attention: Any,
    geometry: Geometry,
    options: ConversionOptions,
    rotation: Rotation,
    statistics: LayerStatistics | None,
    dtype: torch.dtype | None = None,
) -> tuple[State, LayerReport]:
    """State of an `MLAAttention` that stands for `attention`, and how much the factoring lost."""
    dtype = dtype or next(attention.parameters()).dtype
    heads, groups, size = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    whole = read_projections(attention, geometry)
    cut = cut_projections(whole, geometry, options, rotation, statistics)
    stack = cut.stack
    down, up = low_rank.STRATEGIES[options.low_rank](stack)
    up_key, up_value = up.split([stack.key.shape[0] * stack.key.shape[1], groups * size])
    up_key_heads = up_key.unflatten(0, (groups, -1))
    if cut.key_size is not None:
        up_key_heads = up_key_heads * cut.key_size[:, None, None]
    key_rows, rotated_rows = (up_key_heads, up[:0]) if cut.split_keys is None else cut.split_keys(up_key_heads)
    up_heads = torch.cat((key_rows, up_value.unflatten(0, (groups, -1))), dim=1)

    state = cut.state | query_state(cut.query[:, :-1], options.q_lora_rank, stack.input_moment)
    state["kv_a_proj_with_mqa.weight"] = torch.cat((down, cut.down_rows))
    state["kv_b_proj.weight"] = torch.cat((up_heads.flatten(0, 1), rotated_rows))
    state["o_proj.weight"] = whole.output
    if whole.biased or whole.output_bias is not None:
        # A value bias comes through attention unchanged, since its weights sum to one: it belongs to the output.
        passed = whole.output @ whole.value[..., -1].repeat_interleave(heads // groups, 0).flatten()
        state["o_proj.bias"] = passed if whole.output_bias is None else passed + whole.output_bias
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    state = {name: tensor.to(whole.output.device).contiguous() for name, tensor in state.items()}

    weight = stack.rows
    difference = weight - up @ down
    keys = len(up_key)
    return state, LayerReport(
        kv_lora_rank=len(down),
        key_error=relative(difference[:keys], weight[:keys]),
        value_error=relative(difference[keys:], weight[keys:]),
        activation_error=None if stack.input_moment is None else weighted(difference, weight, stack.input_moment),
        rotated_pairs=state["rope_pair_index"].tolist(),
    )


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

    With the input's moment [d, d] the factors fit the queries of real inputs, without it the weights.
    """
    if rank is None:
        return {"q_proj.weight": weight}
    if moment is None:
        down, up = low_rank.truncated_svd(weight, rank)
    else:
        down, up = low_rank.weighted_svd(weight, low_rank.Weights(moment, None), rank)
    return {"q_a_proj.weight": down, "q_b_proj.weight": up}


def relative(difference: torch.Tensor, whole: torch.Tensor) -> float:
    """Frobenius norm of a difference relative to the whole; 0 where there is nothing."""
    norm = float(whole.norm())
    return float(difference.norm()) / norm if norm else 0.0


def weighted(difference: torch.Tensor, whole: torch.Tensor, moment: torch.Tensor) -> float:
    """The same on real activations: ‖(W − Ŵ) x‖ against ‖W x‖ in the mean over x with moment E[x xᵀ]."""
    lost = ((difference @ moment) * difference).sum()
    energy = float(((whole @ moment) * whole).sum())
    return (max(0.0, float(lost)) / energy) ** 0.5 if energy > 0 else 0.0

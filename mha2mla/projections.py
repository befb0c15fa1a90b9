"""What a layer's own attention projects with, whatever its family calls it and however it is fused.

Shapes: d hidden size, H query heads, G key/value heads, D head size, T tokens.
Biases ride along as one more input: weights are [..., d + 1].
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from mha2mla.options import Geometry


@dataclass
class Norms:
    """Root-mean-square norms on queries and keys before rotation: what they multiply each number by, [H, D] and
    [G, D], and whether one norm goes over all heads together (OLMo 2) instead of over each (Qwen3, Gemma 3)."""

    query: torch.Tensor
    key: torch.Tensor
    joint: bool
    eps: float


@dataclass
class Projections:
    """query [H, D, d + 1], key and value [G, D, d + 1], output [d, H * D], its bias [d] or None; float32."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    output_bias: torch.Tensor | None
    biased: bool
    norms: Norms | None


def read_projections(attention: Any, geometry: Geometry) -> Projections:
    """The weights of one attention module of any supported family."""
    heads, groups, size = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    if hasattr(attention, "query_key_value"):  # GPT-NeoX: query, key and value of a head lie together
        rows, biased = with_bias(attention.query_key_value)
        query, key, value = rows.view(heads, 3, size, -1).unbind(1)
    elif hasattr(attention, "qkv_proj"):  # Phi-3: all queries, all keys, all values
        rows, biased = with_bias(attention.qkv_proj)
        query, key, value = (part.view(-1, size, rows.shape[1]) for part in rows.split(fused_sizes(geometry)))
    else:
        parts = [with_bias(getattr(attention, f"{name}_proj")) for name in "qkv"]
        query, key, value = (rows.view(-1, size, rows.shape[1]) for rows, _ in parts)
        biased = any(one for _, one in parts)
    assert len(query) == heads and len(key) == groups
    output = output_projection(attention)
    bias = None if output.bias is None else output.bias.detach().float()
    return Projections(query, key, value, output.weight.detach().float(), bias, biased, read_norms(attention, geometry))


def output_projection(attention: Any) -> Any:
    return attention.dense if hasattr(attention, "dense") else attention.o_proj


def fused_sizes(geometry: Geometry) -> list[int]:
    return [geometry.num_heads * geometry.head_dim, geometry.key_size, geometry.key_size]


def with_bias(projection: Any) -> tuple[torch.Tensor, bool]:
    """Weight and bias (zero if there is none) of a projection, [n, d + 1], and whether there is one."""
    weight = projection.weight.detach().float()
    bias = weight.new_zeros(len(weight)) if projection.bias is None else projection.bias.detach().float()
    return torch.cat((weight, bias[:, None]), dim=1), projection.bias is not None


def read_norms(attention: Any, geometry: Geometry) -> Norms | None:
    if getattr(attention, "k_norm", None) is None:
        return None
    joint = is_joint(attention, geometry)
    norm = attention.k_norm
    eps = float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
    query = multipliers(attention.q_norm, eps).view(-1, geometry.head_dim).expand(geometry.num_heads, -1)
    key = multipliers(attention.k_norm, eps).view(-1, geometry.head_dim).expand(geometry.num_kv_heads, -1)
    return Norms(query.clone(), key.clone(), joint, eps)


def is_joint(attention: Any, geometry: Geometry) -> bool:
    """Whether one norm goes over the numbers of all heads."""
    return attention.q_norm.weight.numel() > geometry.head_dim or attention.k_norm.weight.numel() > geometry.head_dim


def multipliers(norm: Any, eps: float) -> torch.Tensor:
    """What a norm multiplies a vector of unit mean square by: its weight w, or 1 + w in Gemma's."""
    ones = torch.ones(norm.weight.shape, device=norm.weight.device)
    with torch.no_grad():
        return copy.deepcopy(norm).float()(ones) * (1 + eps) ** 0.5


def query_and_key(attention: Any, states: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T, H, D] and keys [T, G, D] of the attention's input [T, d], normed but not rotated."""
    query, key = project(attention, states, geometry)
    if getattr(attention, "k_norm", None) is None:
        return query, key
    if is_joint(attention, geometry):
        query, key = attention.q_norm(query.flatten(1)), attention.k_norm(key.flatten(1))
        return query.unflatten(1, (-1, geometry.head_dim)), key.unflatten(1, (-1, geometry.head_dim))
    return attention.q_norm(query), attention.k_norm(key)


def project(attention: Any, states: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T, H, D] and keys [T, G, D] of states [T, d], as the projections give them."""
    size = geometry.head_dim
    if hasattr(attention, "query_key_value"):
        query, key, _ = attention.query_key_value(states).view(len(states), -1, 3, size).unbind(2)
        return query, key
    if hasattr(attention, "qkv_proj"):
        query, key, _ = attention.qkv_proj(states).split(fused_sizes(geometry), dim=-1)
    else:
        query, key = attention.q_proj(states), attention.k_proj(states)
    return query.unflatten(1, (-1, size)), key.unflatten(1, (-1, size))

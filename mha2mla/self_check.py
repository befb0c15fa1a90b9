"""Proof on the model at hand: at full budget, where conversion must be exact, a converted layer gives what the
original's gives. A family whose attention does something unknown fails here, before anything is saved."""

import copy
from dataclasses import replace
from typing import Any

import torch

from mha2mla.families import attention_layers, geometry_of
from mha2mla.layer import convert_layer
from mha2mla.modeling.modeling_mla import attention_class
from mha2mla.options import ConversionOptions
from mha2mla.target import converted_config, layer_kind, rotate_positions, rotations_of

EXACT = 1e-3  # relative error that is allowed in float32; 1e-6 is what it measures


@torch.no_grad()
def self_check(model: Any, rope: str = "partial") -> float:
    """Largest relative error of the attention of the first layer of every kind (by rotation and window).

    rope: of the conversion (`ConversionOptions`). Every pair rotates and the latent has full rank, on random hidden
    states in float32. ValueError if it is not small.
    """
    error = max(check_layer(model, index, rope) for index in first_of_every_kind(model))
    return require_exact(error, model.config.model_type)


def first_of_every_kind(model: Any) -> list[int]:
    """Numbers of the layers that stand for all others."""
    config, rotary = model.config, model.base_model.rotary_emb
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    kinds: dict[Any, int] = {}
    for index in range(config.num_hidden_layers):
        kinds.setdefault((types[index], layer_kind(rotary, config, index)), index)
    return list(kinds.values())


def require_exact(error: float, model_type: str) -> float:
    if not error < EXACT:
        raise ValueError(
            f"conversion of this {model_type} model is not exact at full budget (relative error "
            f"{error:.1e}, allowed {EXACT}): its attention does something this family's conversion does not know"
        )
    return error


@torch.no_grad()
def check_layer(model: Any, index: int, rope: str = "partial") -> float:
    geometry, layer = geometry_of(model.config), attention_layers(model)[index]
    full = ConversionOptions(rope=rope, rope_dim=0 if rope == "full" else geometry.rotary_size)
    full = replace(full, kv_lora_rank=geometry.full_rank(full.cached_rope_dim))
    config, own_config = converted_config(model.config, full, layer), copy.deepcopy(model.config)
    config._attn_implementation = own_config._attn_implementation = "eager"
    weights, _ = convert_layer(layer, geometry, full, rotations_of(model)[index], None, torch.float32)
    converted = attention_class(config)(config, index).eval()
    converted.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()})
    original = type(layer)(own_config, index).float().eval()
    original.load_state_dict({name: tensor.float().cpu() for name, tensor in layer.state_dict().items()})
    hidden = torch.randn(1, 16, geometry.hidden_size, generator=torch.Generator().manual_seed(0))
    device = next(layer.parameters()).device
    cos, sin = (part.cpu() for part in rotate_positions(model.base_model, hidden.to(device), index))
    mask = torch.full((16, 16), float("-inf")).triu(1)[None, None]
    expected, got = (
        module(hidden, position_embeddings=(cos, sin), attention_mask=mask)[0] for module in (original, converted)
    )
    # A layer that gives nothing (a new block's output projection is zero) is compared with what comes in.
    return float((got - expected).norm() / expected.norm().clamp_min(1e-6 * hidden.norm()))

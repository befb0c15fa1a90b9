"""What exports for engines share: what an engine's latent cache cannot hold, and queries in one piece."""

from typing import Any

import torch


def cache_obstacles(config: Any) -> list[str]:
    """What a converted model keeps that has no place in a cache of one latent and one rotated key a token and layer."""
    found = []
    if config.rope_full or config.latent_rope_dim:
        name = "full" if config.rope_full else "latent"
        found.append(
            f"keys that rotate after the latent (rope={name}), which no engine's cache of latents has; convert with "
            "bits=16 and rope=partial"
        )
    if config.key_scales:
        found.append("norms on queries and keys, whose scales an engine's cache has no place for")
    if config.num_rope_heads != 1:
        found.append(
            "a rotated key for every key head; convert with rope_basis=principal and partial_rope=rotation-cost, or "
            "evenly-spaced for a native checkpoint"
        )
    if getattr(config, "sliding_window", None):
        found.append("a sliding window, which latent kernels do not have")
    if config.layer_kv_lora_rank is not None:
        found.append("latents of different sizes; convert with rank_allocation=uniform")
    if config.latent_layers is not None:
        found.append("layers without latent attention; convert with layers=all")
    return found


def refuse_half(model: Any, what: str) -> None:
    if model.dtype == torch.float16:
        raise ValueError(
            f"no {what} in float16: the latents' norm is made harmless by numbers it has not; use bfloat16"
        )


def whole_query(attention: Any) -> torch.Tensor:
    """The query projection [H * K, d] in float32, its factors multiplied where it has some."""
    if hasattr(attention, "q_proj"):
        weight: torch.Tensor = attention.q_proj.weight.float()
        return weight
    product: torch.Tensor = attention.q_b_proj.weight.float() @ attention.q_a_proj.weight.float()
    return product

"""Tiny random models of every family and attention type, shared by the tests."""

from dataclasses import fields
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conf.naming import presets
from mha2mla import ConversionOptions

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KV_HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
}


WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
# What makes each family different, switched on: its windows, caps, factors, layers without rotation, experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "gemma2": WINDOWS | {"head_dim": 12, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 4.0},
    "gemma3_text": WINDOWS
    | {
        "head_dim": 12,
        "query_pre_attn_scalar": 5,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "head_dim": 12},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def tiny_model(family: str = "llama", kv_heads: int = 2, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model whose attention matters: weights large enough that scores, biases and norms differ."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_key_value_heads": kv_heads, "tie_word_embeddings": True, **FAMILIES[family], **changes}
    if family == "gpt_neox":
        del sizes["num_key_value_heads"]  # it has as many as query heads
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name and "gemma" not in family))
    return model.eval()


def heads_of(family: str) -> list[str]:
    """Attention types that a family has."""
    return ["mha"] if family == "gpt_neox" else list(KV_HEADS)


VARIANTS = [(family, heads) for family in FAMILIES for heads in heads_of(family)]


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def preset(name: str) -> dict[str, Any]:
    """What a file of conf/method/ says of the conversion itself, but for bits: by rank alone."""
    known = {item.name for item in fields(ConversionOptions)} - {"bits"}
    return {key: value for key, value in presets()[name].items() if key in known}

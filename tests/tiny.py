"""Tiny random models of every family and attention type, shared by the tests."""

from dataclasses import fields
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

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


def tiny_model(family: str = "llama", kv_heads: int = 2, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model whose attention matters: weights large enough that scores, biases and norms differ."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_key_value_heads": kv_heads, "tie_word_embeddings": True, **changes}
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**{"sliding_window": None, **sizes}))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
    return model.eval()


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def preset(name: str) -> dict[str, Any]:
    """What a file of conf/method/ says of the conversion itself."""
    known = {item.name for item in fields(ConversionOptions)}
    return {key: value for key, value in presets()[name].items() if key in known}

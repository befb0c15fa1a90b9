"""Model families that can be converted: which classes a model of each turns into, and where its attention is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mha2mla.modeling import configuration_mla as configurations
from mha2mla.modeling import modeling_mla as models
from mha2mla.options import Geometry


@dataclass(frozen=True)
class Family:
    """One row of the table. `model_type` is the original's, as its config says."""

    model_type: str
    config_class: Any
    model_class: Any
    causal_lm_class: Any


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", configurations.LlamaMLAConfig, models.LlamaMLAModel, models.LlamaMLAForCausalLM),
        Family("mistral", configurations.MistralMLAConfig, models.MistralMLAModel, models.MistralMLAForCausalLM),
        Family("qwen2", configurations.Qwen2MLAConfig, models.Qwen2MLAModel, models.Qwen2MLAForCausalLM),
    )
}


def family_of(config: Any) -> Family:
    """The family of a model by its configuration; ValueError names those that are supported."""
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    converted = {family.config_class.model_type for family in FAMILIES.values()}
    if model_type in converted:
        raise ValueError(f"this model is converted already (model type {model_type}); give the original")
    raise ValueError(f"model family {model_type!r} is not supported; supported are: {', '.join(sorted(FAMILIES))}")


def attention_layers(model: Any) -> list[Any]:
    """The attention modules of a decoder, first layer first."""
    return [layer.self_attn for layer in model.base_model.layers]


def geometry_of(config: Any) -> Geometry:
    """Attention sizes as a model's configuration gives them."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Geometry(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, head_dim)


def register(register_config: Callable, register_model: Callable, register_causal_lm: Callable) -> None:
    """Tell the Auto classes about every family, and mark the classes so that a checkpoint carries their code."""
    for family in FAMILIES.values():
        register_config(family.config_class.model_type, family.config_class, exist_ok=True)
        register_model(family.config_class, family.model_class, exist_ok=True)
        register_causal_lm(family.config_class, family.causal_lm_class, exist_ok=True)
        family.config_class.register_for_auto_class("AutoConfig")
        family.model_class.register_for_auto_class("AutoModel")
        family.causal_lm_class.register_for_auto_class("AutoModelForCausalLM")

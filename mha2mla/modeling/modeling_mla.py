"""Converted models: each family's own classes with latent attention in every layer, and nothing else changed.

A further family is three classes here, a configuration in configuration_mla.py and a row in families.py.
"""

from typing import Any

from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    Qwen2ForCausalLM,
    Qwen2Model,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .attention_mla import MLAAttention
from .configuration_mla import LlamaMLAConfig, MistralMLAConfig, Qwen2MLAConfig


class MLAModelMixin:
    """Before a family's decoder: builds it, then puts latent attention in place of every layer's own."""

    layers: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # a mixin: the family's class comes next
        for index, layer in enumerate(self.layers):
            layer.self_attn = MLAAttention(config, index)
        self.post_init()


class MLAForCausalLMMixin:
    """Before a family's causal language model: the same model around the converted decoder."""

    decoder_class: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # a mixin: the family's class comes next
        self.model = self.decoder_class(config)
        self.post_init()


class LlamaMLAModel(MLAModelMixin, LlamaModel):
    config_class = LlamaMLAConfig
    config: LlamaMLAConfig
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": MLAAttention}


class LlamaMLAForCausalLM(MLAForCausalLMMixin, LlamaForCausalLM):
    config_class = LlamaMLAConfig
    config: LlamaMLAConfig
    decoder_class = LlamaMLAModel
    _tp_plan: Any = None


class MistralMLAModel(MLAModelMixin, MistralModel):
    config_class = MistralMLAConfig
    config: MistralMLAConfig
    _can_record_outputs = {"hidden_states": MistralDecoderLayer, "attentions": MLAAttention}


class MistralMLAForCausalLM(MLAForCausalLMMixin, MistralForCausalLM):
    config_class = MistralMLAConfig
    config: MistralMLAConfig
    decoder_class = MistralMLAModel
    _tp_plan: Any = None


class Qwen2MLAModel(MLAModelMixin, Qwen2Model):
    config_class = Qwen2MLAConfig
    config: Qwen2MLAConfig
    _can_record_outputs = {"hidden_states": Qwen2DecoderLayer, "attentions": MLAAttention}


class Qwen2MLAForCausalLM(MLAForCausalLMMixin, Qwen2ForCausalLM):
    config_class = Qwen2MLAConfig
    config: Qwen2MLAConfig
    decoder_class = Qwen2MLAModel
    _tp_plan: Any = None


__all__ = [
    "LlamaMLAForCausalLM",
    "LlamaMLAModel",
    "MistralMLAForCausalLM",
    "MistralMLAModel",
    "Qwen2MLAForCausalLM",
    "Qwen2MLAModel",
]

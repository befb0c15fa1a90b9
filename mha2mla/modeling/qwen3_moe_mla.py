"""Qwen3 mixtures of experts with latent attention."""

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class Qwen3MoeMLAConfig(MLAConfigMixin, Qwen3MoeConfig):
    model_type = "qwen3_moe_mla"


class Qwen3MoeMLAModel(MLAModelMixin, Qwen3MoeModel):
    config_class = Qwen3MoeMLAConfig
    config: Qwen3MoeMLAConfig


class Qwen3MoeMLAForCausalLM(MLAForCausalLMMixin, Qwen3MoeForCausalLM):
    config_class = Qwen3MoeMLAConfig
    config: Qwen3MoeMLAConfig
    decoder_class = Qwen3MoeMLAModel


__all__ = ["Qwen3MoeMLAConfig", "Qwen3MoeMLAForCausalLM", "Qwen3MoeMLAModel"]

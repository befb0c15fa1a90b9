"""Qwen3 with latent attention."""

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class Qwen3MLAConfig(MLAConfigMixin, Qwen3Config):
    model_type = "qwen3_mla"


class Qwen3MLAModel(MLAModelMixin, Qwen3Model):
    config_class = Qwen3MLAConfig
    config: Qwen3MLAConfig


class Qwen3MLAForCausalLM(MLAForCausalLMMixin, Qwen3ForCausalLM):
    config_class = Qwen3MLAConfig
    config: Qwen3MLAConfig
    decoder_class = Qwen3MLAModel


__all__ = ["Qwen3MLAConfig", "Qwen3MLAForCausalLM", "Qwen3MLAModel"]

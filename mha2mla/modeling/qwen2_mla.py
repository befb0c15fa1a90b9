"""Qwen2 and Qwen2.5 with latent attention."""

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class Qwen2MLAConfig(MLAConfigMixin, Qwen2Config):
    model_type = "qwen2_mla"


class Qwen2MLAModel(MLAModelMixin, Qwen2Model):
    config_class = Qwen2MLAConfig
    config: Qwen2MLAConfig


class Qwen2MLAForCausalLM(MLAForCausalLMMixin, Qwen2ForCausalLM):
    config_class = Qwen2MLAConfig
    config: Qwen2MLAConfig
    decoder_class = Qwen2MLAModel


__all__ = ["Qwen2MLAConfig", "Qwen2MLAForCausalLM", "Qwen2MLAModel"]

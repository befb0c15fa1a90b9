"""Gemma 2 with latent attention."""

from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class Gemma2MLAConfig(MLAConfigMixin, Gemma2Config):
    model_type = "gemma2_mla"


class Gemma2MLAModel(MLAModelMixin, Gemma2Model):
    config_class = Gemma2MLAConfig
    config: Gemma2MLAConfig


class Gemma2MLAForCausalLM(MLAForCausalLMMixin, Gemma2ForCausalLM):
    config_class = Gemma2MLAConfig
    config: Gemma2MLAConfig
    decoder_class = Gemma2MLAModel


__all__ = ["Gemma2MLAConfig", "Gemma2MLAForCausalLM", "Gemma2MLAModel"]

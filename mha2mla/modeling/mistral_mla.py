"""Mistral with latent attention."""

from transformers import MistralConfig, MistralForCausalLM, MistralModel

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class MistralMLAConfig(MLAConfigMixin, MistralConfig):
    model_type = "mistral_mla"


class MistralMLAModel(MLAModelMixin, MistralModel):
    config_class = MistralMLAConfig
    config: MistralMLAConfig


class MistralMLAForCausalLM(MLAForCausalLMMixin, MistralForCausalLM):
    config_class = MistralMLAConfig
    config: MistralMLAConfig
    decoder_class = MistralMLAModel


__all__ = ["MistralMLAConfig", "MistralMLAForCausalLM", "MistralMLAModel"]

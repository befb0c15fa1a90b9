"""Granite with latent attention."""

from transformers import GraniteConfig, GraniteForCausalLM, GraniteModel

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class GraniteMLAConfig(MLAConfigMixin, GraniteConfig):
    model_type = "granite_mla"


class GraniteMLAModel(MLAModelMixin, GraniteModel):
    config_class = GraniteMLAConfig
    config: GraniteMLAConfig


class GraniteMLAForCausalLM(MLAForCausalLMMixin, GraniteForCausalLM):
    config_class = GraniteMLAConfig
    config: GraniteMLAConfig
    decoder_class = GraniteMLAModel


__all__ = ["GraniteMLAConfig", "GraniteMLAForCausalLM", "GraniteMLAModel"]

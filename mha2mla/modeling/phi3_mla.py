"""Phi-3 and Phi-4 with latent attention."""

from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class Phi3MLAConfig(MLAConfigMixin, Phi3Config):
    model_type = "phi3_mla"


class Phi3MLAModel(MLAModelMixin, Phi3Model):
    config_class = Phi3MLAConfig
    config: Phi3MLAConfig


class Phi3MLAForCausalLM(MLAForCausalLMMixin, Phi3ForCausalLM):
    config_class = Phi3MLAConfig
    config: Phi3MLAConfig
    decoder_class = Phi3MLAModel


__all__ = ["Phi3MLAConfig", "Phi3MLAForCausalLM", "Phi3MLAModel"]

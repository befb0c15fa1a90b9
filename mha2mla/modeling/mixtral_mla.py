"""Mixtral with latent attention."""

from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class MixtralMLAConfig(MLAConfigMixin, MixtralConfig):
    model_type = "mixtral_mla"


class MixtralMLAModel(MLAModelMixin, MixtralModel):
    config_class = MixtralMLAConfig
    config: MixtralMLAConfig


class MixtralMLAForCausalLM(MLAForCausalLMMixin, MixtralForCausalLM):
    config_class = MixtralMLAConfig
    config: MixtralMLAConfig
    decoder_class = MixtralMLAModel


__all__ = ["MixtralMLAConfig", "MixtralMLAForCausalLM", "MixtralMLAModel"]

"""OLMoE with latent attention."""

from transformers import OlmoeConfig, OlmoeForCausalLM, OlmoeModel

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class OlmoeMLAConfig(MLAConfigMixin, OlmoeConfig):
    model_type = "olmoe_mla"


class OlmoeMLAModel(MLAModelMixin, OlmoeModel):
    config_class = OlmoeMLAConfig
    config: OlmoeMLAConfig


class OlmoeMLAForCausalLM(MLAForCausalLMMixin, OlmoeForCausalLM):
    config_class = OlmoeMLAConfig
    config: OlmoeMLAConfig
    decoder_class = OlmoeMLAModel


__all__ = ["OlmoeMLAConfig", "OlmoeMLAForCausalLM", "OlmoeMLAModel"]

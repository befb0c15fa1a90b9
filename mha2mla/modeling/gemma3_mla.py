"""Gemma 3's language models with latent attention."""

from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class Gemma3MLAConfig(MLAConfigMixin, Gemma3TextConfig):
    model_type = "gemma3_text_mla"


class Gemma3MLAModel(MLAModelMixin, Gemma3TextModel):
    config_class = Gemma3MLAConfig
    config: Gemma3MLAConfig


class Gemma3MLAForCausalLM(MLAForCausalLMMixin, Gemma3ForCausalLM):
    config_class = Gemma3MLAConfig
    config: Gemma3MLAConfig
    decoder_class = Gemma3MLAModel


__all__ = ["Gemma3MLAConfig", "Gemma3MLAForCausalLM", "Gemma3MLAModel"]

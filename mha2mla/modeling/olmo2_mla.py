"""OLMo 2 with latent attention."""

from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo2Model

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class Olmo2MLAConfig(MLAConfigMixin, Olmo2Config):
    model_type = "olmo2_mla"


class Olmo2MLAModel(MLAModelMixin, Olmo2Model):
    config_class = Olmo2MLAConfig
    config: Olmo2MLAConfig


class Olmo2MLAForCausalLM(MLAForCausalLMMixin, Olmo2ForCausalLM):
    config_class = Olmo2MLAConfig
    config: Olmo2MLAConfig
    decoder_class = Olmo2MLAModel


__all__ = ["Olmo2MLAConfig", "Olmo2MLAForCausalLM", "Olmo2MLAModel"]

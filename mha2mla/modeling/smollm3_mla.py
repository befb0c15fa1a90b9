"""SmolLM3 with latent attention."""

from transformers import SmolLM3Config, SmolLM3ForCausalLM, SmolLM3Model

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class SmolLM3MLAConfig(MLAConfigMixin, SmolLM3Config):
    model_type = "smollm3_mla"


class SmolLM3MLAModel(MLAModelMixin, SmolLM3Model):
    config_class = SmolLM3MLAConfig
    config: SmolLM3MLAConfig


class SmolLM3MLAForCausalLM(MLAForCausalLMMixin, SmolLM3ForCausalLM):
    config_class = SmolLM3MLAConfig
    config: SmolLM3MLAConfig
    decoder_class = SmolLM3MLAModel


__all__ = ["SmolLM3MLAConfig", "SmolLM3MLAForCausalLM", "SmolLM3MLAModel"]

"""Llama with latent attention."""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class LlamaMLAConfig(MLAConfigMixin, LlamaConfig):
    model_type = "llama_mla"


class LlamaMLAModel(MLAModelMixin, LlamaModel):
    config_class = LlamaMLAConfig
    config: LlamaMLAConfig


class LlamaMLAForCausalLM(MLAForCausalLMMixin, LlamaForCausalLM):
    config_class = LlamaMLAConfig
    config: LlamaMLAConfig
    decoder_class = LlamaMLAModel


__all__ = ["LlamaMLAConfig", "LlamaMLAForCausalLM", "LlamaMLAModel"]

"""GPT-NeoX and Pythia with latent attention."""

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel

from .configuration_mla import MLAConfigMixin
from .modeling_mla import MLAForCausalLMMixin, MLAModelMixin


class GPTNeoXMLAConfig(MLAConfigMixin, GPTNeoXConfig):
    model_type = "gpt_neox_mla"
    head_dim: int | None = None
    num_key_value_heads: int | None = None


class GPTNeoXMLAModel(MLAModelMixin, GPTNeoXModel):
    config_class = GPTNeoXMLAConfig
    config: GPTNeoXMLAConfig
    attention_name = "attention"


class GPTNeoXMLAForCausalLM(MLAForCausalLMMixin, GPTNeoXForCausalLM):
    config_class = GPTNeoXMLAConfig
    config: GPTNeoXMLAConfig
    decoder_class = GPTNeoXMLAModel


__all__ = ["GPTNeoXMLAConfig", "GPTNeoXMLAForCausalLM", "GPTNeoXMLAModel"]

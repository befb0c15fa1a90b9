"""Converted models: each family's own classes with latent attention in its layers, and nothing else changed.

A family is three classes in a file of its own here (<family>_mla.py) and a row in families.py.
"""

from typing import Any

from .attention_full_rope_mla import FullRopeMLAAttention
from .attention_mla import MLAAttention
from .attention_normed_mla import NormedMLAAttention
from .attention_served_mla import ServedMLAAttention


def attention_class(config: Any) -> type[MLAAttention]:
    if config.served:
        return ServedMLAAttention
    if config.rope_full:
        return FullRopeMLAAttention
    return NormedMLAAttention if config.key_scales else MLAAttention


class MLAModelMixin:
    """Before a family's decoder: builds it, then puts latent attention in place of its layers' own."""

    attention_name = "self_attn"
    layers: Any
    post_init: Any
    _can_record_outputs: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        recorded = dict(getattr(cls, "_can_record_outputs", None) or {})
        # The family's own too: layers that stay as they are have it.
        cls._can_record_outputs = recorded | {"attentions": [MLAAttention, recorded["attentions"]]}

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # a mixin: the family's class comes next
        attention = attention_class(config)
        for index, layer in enumerate(self.layers):
            if config.latent_layers is None or index in config.latent_layers:
                setattr(layer, self.attention_name, attention(config, index))
        self.post_init()


class MLAForCausalLMMixin:
    """Before a family's causal language model: the same model around the converted decoder."""

    decoder_class: Any
    base_model_prefix: str
    post_init: Any
    _tp_plan: Any = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # a mixin: the family's class comes next
        setattr(self, self.base_model_prefix, self.decoder_class(config))
        self.post_init()

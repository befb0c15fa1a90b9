"""Converted models: each family's own classes with latent attention in its layers, and nothing else changed.

A family is three classes in a file of its own here (<family>_mla.py) and a row in families.py.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .attention_full_rope_mla import FullRopeMLAAttention
from .attention_latent_rope_mla import LatentRopeMLAAttention
from .attention_mla import MLAAttention
from .attention_normed_mla import NormedMLAAttention
from .attention_served_mla import ServedMLAAttention
from .quantized_cache_mla import FormatCache


def attention_class(config: Any) -> type[MLAAttention]:
    if config.served:
        return ServedMLAAttention
    if config.rope_full:
        return FullRopeMLAAttention
    if config.latent_rope_dim:
        return LatentRopeMLAAttention
    return NormedMLAAttention if config.key_scales else MLAAttention


class MLAModelMixin:
    """Before a family's decoder: builds it, then puts latent attention in place of its layers' own."""

    attention_name = "self_attn"
    layers: Any
    post_init: Any
    _can_record_outputs: Any
    forward: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        recorded = dict(getattr(cls, "_can_record_outputs", None) or {})
        # The family's own too: layers that stay as they are have it.
        cls._can_record_outputs = recorded | {"attentions": [MLAAttention, recorded["attentions"]]}
        cls.forward = with_own_cache(cls.forward)

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
    config: Any
    _tp_plan: Any = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # a mixin: the family's class comes next
        setattr(self, self.base_model_prefix, self.decoder_class(config))
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`generate`'s cache: a model with a format has its own, where none is given or asked for."""
        wanted = generation_config.cache_implementation
        given = model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False
        if not has_format(self.config) or given or wanted == "dynamic":
            prepare = super()._prepare_cache_for_generation  # type: ignore[misc]  # the family's class comes next
            return prepare(generation_config, model_kwargs, *args, **kwargs)
        if wanted is not None:
            raise ValueError(
                f"cache_implementation={wanted!r}: a model with a cache format has its own quantised cache, made when "
                "none is asked for, and 'dynamic', which is unquantised"
            )
        cache = FormatCache(self.config)
        if getattr(generation_config, "is_assistant", False) and hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
        return None


def has_format(config: Any) -> bool:
    return bool(config.cache_format) and not config.served


def with_own_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder's `forward` that makes the cache of its format where transformers' would make an unquantised one.

    Training, and gradients that nobody asked a cache beside, see one window with simulated codes instead.
    """
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if has_format(self.config):
            kwargs = dict(zip(names, args, strict=False)) | kwargs
            args = ()
            wanted = kwargs.get("use_cache")
            if kwargs.get("past_key_values") is None and (self.config.use_cache if wanted is None else wanted):
                if self.training or (wanted is None and torch.is_grad_enabled()):
                    kwargs["use_cache"] = False
                else:
                    kwargs["past_key_values"] = FormatCache(self.config)
        return forward(self, *args, **kwargs)

    return wrapped

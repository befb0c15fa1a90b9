"""Model families that can be converted: which classes a model of each turns into, and where its attention is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mha2mla.modeling import (
    gemma2_mla,
    gemma3_mla,
    gpt_neox_mla,
    granite_mla,
    llama_mla,
    mistral_mla,
    mixtral_mla,
    olmo2_mla,
    olmoe_mla,
    phi3_mla,
    qwen2_mla,
    qwen3_mla,
    qwen3_moe_mla,
    smollm3_mla,
)
from mha2mla.options import Geometry


@dataclass(frozen=True)
class Family:
    """One row of the table. `model_type` is the original's, as its config says.

    norms: what its attention norms queries and keys over before rotation: nothing, every head or all heads.
    """

    model_type: str
    config_class: Any
    model_class: Any
    causal_lm_class: Any
    norms: str | None = None

    @property
    def attention_name(self) -> str:
        return str(self.model_class.attention_name)


def family(model_type: str, module: Any, norms: str | None = None) -> Family:
    config, causal_lm, model = (getattr(module, name) for name in module.__all__)
    return Family(model_type, config, model, causal_lm, norms)


FAMILIES = {
    row.model_type: row
    for row in (
        family("llama", llama_mla),
        family("mistral", mistral_mla),
        family("qwen2", qwen2_mla),
        family("qwen3", qwen3_mla, norms="head"),
        family("gemma2", gemma2_mla),
        family("gemma3_text", gemma3_mla, norms="head"),
        family("phi3", phi3_mla),
        family("olmo2", olmo2_mla, norms="all"),
        family("granite", granite_mla),
        family("smollm3", smollm3_mla),
        family("gpt_neox", gpt_neox_mla),
        family("mixtral", mixtral_mla),
        family("qwen3_moe", qwen3_moe_mla, norms="head"),
        family("olmoe", olmoe_mla, norms="all"),
    )
}
STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm", "retnet")
MIXED = (
    "jamba",
    "bamba",
    "zamba",
    "zamba2",
    "granitemoehybrid",
    "falcon_h1",
    "qwen3_next",
    "lfm2",
    "nemotron_h",
    "minimax",
)


def family_of(config: Any) -> Family:
    """The family of a model by its configuration; ValueError says why it has none and which are supported."""
    model_type = getattr(config, "model_type", None)
    supported = f"supported are: {', '.join(sorted(FAMILIES))}"
    if model_type in FAMILIES:
        refuse_quantized(config)
        refuse_odd(config, FAMILIES[model_type])
        return FAMILIES[model_type]
    converted = {row.config_class.model_type for row in FAMILIES.values()}
    if model_type in converted:
        raise ValueError(f"this model is converted already (model type {model_type}); give the original")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"model family {model_type!r} has latent attention of its own: there is nothing to convert")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model family {model_type!r} is an encoder-decoder; only decoders are converted; {supported}")
    if model_type in STATE_SPACE:
        raise ValueError(f"model family {model_type!r} has no attention and so no KV cache to convert; {supported}")
    if model_type in MIXED:
        raise ValueError(
            f"model family {model_type!r} mixes attention with layers of another kind, which is not supported; "
            + supported
        )
    if any("Masked" in name or "Encoder" in name for name in getattr(config, "architectures", None) or ()):
        raise ValueError(f"model family {model_type!r} is an encoder, which keeps no KV cache; {supported}")
    text = getattr(getattr(config, "text_config", None), "model_type", None)
    if text in FAMILIES:
        raise ValueError(
            f"model family {model_type!r} wraps a {text} language model together with other inputs; give a checkpoint "
            f"of the language model alone; {supported}"
        )
    raise ValueError(f"model family {model_type!r} is not supported; {supported}")


def refuse_quantized(config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return
    get = quantization.get if isinstance(quantization, dict) else lambda name: getattr(quantization, name, None)
    raise ValueError(
        f"the checkpoint's weights are quantised ({get('quant_method')}), and factoring needs them whole: give the "
        "checkpoint it was made from, or load it with dequantize and save that; the result can be quantised again"
    )


def refuse_odd(config: Any, family: Family) -> None:
    """Settings that a family has and no released model of it uses."""
    if family.norms and getattr(config, "attention_bias", False):
        raise ValueError("attention_bias=True: biases under norms on queries and keys do not come out of a latent")
    if getattr(config, "clip_qkv", None) is not None:
        raise ValueError(f"clip_qkv={config.clip_qkv}: clipped keys and values do not come out of a latent")


def attention_layers(model: Any) -> list[Any]:
    """The attention modules of a decoder, first layer first."""
    name = getattr(type(model.base_model), "attention_name", None) or family_of(model.config).attention_name
    return [getattr(layer, name) for layer in model.base_model.layers]


def latent_layers(model: Any) -> list[tuple[int, Any]]:
    """Number and attention of a converted model's layers that have latent attention."""
    return [(index, layer) for index, layer in enumerate(attention_layers(model)) if hasattr(layer, "kv_lora_rank")]


def geometry_of(config: Any) -> Geometry:
    """Attention sizes as an original model's configuration gives them."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    norms = FAMILIES[config.model_type].norms
    scales = {None: 0, "all": 1, "head": groups}[norms]
    return Geometry(config.hidden_size, heads, groups, head_dim, rotary_dim(config, head_dim), scales)


def rotary_dim(config: Any, head_dim: int) -> int:
    """How many numbers of a head rotate, 0 for all of them."""
    factor = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return 0 if factor == 1 else int(head_dim * factor)


def register(register_config: Callable, register_model: Callable, register_causal_lm: Callable) -> None:
    """Tell the Auto classes about every family, and mark the classes so that a checkpoint carries their code."""
    for row in FAMILIES.values():
        register_config(row.config_class.model_type, row.config_class, exist_ok=True)
        register_model(row.config_class, row.model_class, exist_ok=True)
        register_causal_lm(row.config_class, row.causal_lm_class, exist_ok=True)
        row.config_class.register_for_auto_class("AutoConfig")
        row.model_class.register_for_auto_class("AutoModel")
        row.causal_lm_class.register_for_auto_class("AutoModelForCausalLM")

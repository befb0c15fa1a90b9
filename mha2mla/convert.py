"""Conversion of a pretrained model into one with latent attention: a pure function of model, options, statistics.

The original model is not touched and shares no memory with the result. Layers are converted one by one in
float32 (singular values in float64) and stored in the model's own dtype.
"""

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mha2mla import allocation, basis, low_rank, partial_rope
from mha2mla.families import attention_layers, family_of, geometry_of
from mha2mla.layer import LayerReport, convert_layer, cut_layer
from mha2mla.modeling.attention_mla import MLAAttention
from mha2mla.options import PER_HEAD, ConversionOptions, Geometry
from mha2mla.rotation import Rotation, shares_rotated_key
from mha2mla.statistics import Statistics

TABLES: dict[str, Any] = {
    "partial_rope": partial_rope,
    "rope_basis": basis,
    "low_rank": low_rank,
    "rank_allocation": allocation,
}
EXACT = 1e-3  # relative error that the self-check allows in float32; 1e-6 is what it measures


@dataclass
class ConversionReport:
    """What a conversion did. Cache sizes are numbers a token a layer, in the mean over the layers; `reduction`
    compares them in one dtype."""

    options: ConversionOptions
    geometry: Geometry
    cache_size: float
    original_cache_size: int
    reduction: float
    self_check_error: float
    layers: list[LayerReport]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve_options(config: Any, options: ConversionOptions) -> ConversionOptions:
    """The options with all sizes filled in, checked against a model's configuration alone (no weights needed)."""
    family_of(config)
    for name, module in TABLES.items():
        if getattr(options, name) not in module.STRATEGIES:
            known = ", ".join(module.STRATEGIES)
            raise ValueError(f"{name}={getattr(options, name)!r} is unknown; choose one of: {known}")
    if options.rope_basis != "heads" and options.partial_rope in PER_HEAD:
        raise ValueError(
            f"partial_rope={options.partial_rope} chooses pairs of key heads, which rope_basis={options.rope_basis} "
            "mixes; use rope_basis=heads, or partial_rope=rotation-cost or evenly-spaced"
        )
    if options.rope_basis == "heads" and options.partial_rope == "evenly-spaced":
        raise ValueError("partial_rope=evenly-spaced keeps strongest components: it needs rope_basis=principal")
    if options.frequency_folding != 1 and options.rope_basis == "heads":
        raise ValueError(
            f"frequency_folding={options.frequency_folding} looks for components of several frequencies: it needs "
            "rope_basis=principal"
        )
    if options.rank_allocation != "uniform" and options.low_rank not in low_rank.JOINT:
        raise ValueError(
            f"rank_allocation={options.rank_allocation} compares what factoring keys and values together loses; "
            f"low_rank={options.low_rank} keeps them apart: use one of {', '.join(low_rank.JOINT)}, or uniform"
        )
    geometry = geometry_of(config)
    resolved = options.resolve(geometry)
    if resolved.partial_rope not in partial_rope.NEEDS_CALIBRATION:
        assert resolved.rope_dim is not None
        partial_rope.STRATEGIES[resolved.partial_rope](partial_rope.Pairs(geometry, resolved.rope_dim // 2))
    return resolved


def needs_calibration(options: ConversionOptions) -> list[str]:
    """Those of the options that look at calibration text, as `name=value`."""
    chosen = {name: getattr(options, name) for name in TABLES}
    return [f"{name}={value}" for name, value in chosen.items() if value in TABLES[name].NEEDS_CALIBRATION]


def convert(
    model: Any, options: ConversionOptions, calibration: Statistics | None = None
) -> tuple[Any, ConversionReport]:
    """Turn a Llama, Mistral or Qwen2 model (MHA, GQA or MQA) into its latent-attention counterpart.

    model: a base model or causal language model of transformers.
    calibration: from `collect_statistics`; needed by partial_rope="2-norm", otherwise it adds the errors on real
        activations to the report.
    Returns the converted model (same dtype, device and mode of training) and a report.
    Raises ValueError for an unsupported family, for sizes that do not fit, and where calibration is missing.
    """
    family, geometry = family_of(model.config), geometry_of(model.config)
    options = resolve_options(model.config, options)
    if needs_calibration(options) and calibration is None:
        wanting = ", ".join(needs_calibration(options))
        raise ValueError(f"{wanting}: looks at calibration text; pass calibration=collect_statistics(...)")
    error = self_check(model)
    ranks = allocate(model, options, calibration)
    config = converted_config(model.config, options, ranks)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    state = {name: tensor for name, tensor in model.state_dict().items() if ".self_attn." not in name}
    reports, rotation = [], rotation_of(model)
    for index, attention in enumerate(attention_layers(model)):
        statistics = calibration.layers[index] if calibration else None
        own = replace(options, kv_lora_rank=ranks[index])
        weights, report = convert_layer(attention, geometry, own, rotation, statistics)
        state |= {f"{prefix}layers.{index}.self_attn.{name}": tensor for name, tensor in weights.items()}
        reports.append(report)
    target = family.model_class if model.base_model is model else family.causal_lm_class
    converted = build(target, config, state, model)
    assert options.rope_dim is not None
    size = options.rope_dim + sum(ranks) / len(ranks)
    reduction = 1 - size / geometry.cache_size
    return converted, ConversionReport(options, geometry, size, geometry.cache_size, reduction, error, reports)


def allocate(model: Any, options: ConversionOptions, calibration: Statistics | None) -> list[int]:
    """The rank of every layer's latent."""
    assert options.rope_dim is not None and options.kv_lora_rank is not None
    layers = attention_layers(model)
    if options.rank_allocation == "uniform":
        return [options.kv_lora_rank] * len(layers)
    geometry, rotation = geometry_of(model.config), rotation_of(model)
    full, energies = geometry.full_rank(options.rope_dim), []
    for index, attention in enumerate(layers):
        statistics = calibration.layers[index] if calibration else None
        stack = cut_layer(attention, geometry, options, rotation, statistics).stack
        energies.append(low_rank.energies(stack, options.low_rank)[:full])
    return allocation.STRATEGIES[options.rank_allocation](energies, options.kv_lora_rank)


def rotation_of(model: Any) -> Rotation:
    """The model's rotary embedding as scaled by its family (YaRN and LongRoPE also put a factor on cos and sin)."""
    rotary = model.base_model.rotary_emb
    scale = float(getattr(rotary, "attention_scaling", 1.0))
    return Rotation(rotary.inv_freq.float(), scale, model.config.max_position_embeddings)


def converted_config(config: Any, options: ConversionOptions, ranks: list[int] | None = None) -> Any:
    """The family's MLA configuration: everything of the original, and the sizes of the latent attention."""
    own_ranks = ranks if options.rank_allocation != "uniform" else None
    family, geometry = family_of(config), geometry_of(config)
    kept = config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "quantization_config"):
        kept.pop(name, None)
    assert options.rope_dim is not None
    size, one_key = geometry.head_dim, shares_rotated_key(options)
    rotated = options.rope_dim if one_key else options.rope_dim // geometry.num_kv_heads
    qkv_bias = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
    return family.config_class(
        **kept
        | {
            # Saving adds the class that is saved; serving engines also look for the decoder alone.
            "auto_map": {"AutoModel": f"{family.model_class.__module__.split('.')[-1]}.{family.model_class.__name__}"},
            "head_dim": size,
            "kv_lora_rank": options.kv_lora_rank,
            "layer_kv_lora_rank": own_ranks,
            "q_lora_rank": options.q_lora_rank,
            "num_rope_heads": 1 if one_key else geometry.num_kv_heads,
            "qk_rope_head_dim": rotated,
            "qk_nope_head_dim": size if one_key else size - rotated,
            "v_head_dim": size,
            "softmax_scale": size**-0.5,
            "q_proj_bias": qkv_bias,
            "kv_a_proj_bias": qkv_bias,
            "o_proj_bias": qkv_bias,
        }
    )


def build(target: Any, config: Any, state: dict[str, torch.Tensor], original: Any) -> Any:
    """A model of class `target` holding copies of `state`, placed and set like the original."""
    first = next(original.parameters())
    attention = getattr(original.config, "_attn_implementation", None)
    with torch.device("meta"):
        converted = target._from_config(config, attn_implementation=attention, dtype=first.dtype)
    rotary = type(original.base_model.rotary_emb)(config=config)
    converted.base_model.rotary_emb = rotary.to(first.device)
    converted.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    converted.tie_weights()
    converted.train(original.training)
    if getattr(original, "generation_config", None) is not None:
        converted.generation_config = original.generation_config
    return converted


@torch.no_grad()
def self_check(model: Any) -> float:
    """Relative error of the first layer's attention at full budget, where conversion must be exact.

    Every pair rotates and the latent has full rank, on random hidden states in float32. ValueError if it is not.
    """
    geometry = geometry_of(model.config)
    full = ConversionOptions(rope_dim=geometry.key_size, kv_lora_rank=geometry.full_rank(geometry.key_size))
    layer = attention_layers(model)[0]
    config, own_config = converted_config(model.config, full), copy.deepcopy(model.config)
    config._attn_implementation = own_config._attn_implementation = "eager"
    weights, _ = convert_layer(layer, geometry, full, rotation_of(model), None, torch.float32)
    converted = MLAAttention(config, 0).eval()
    converted.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()})
    original = type(layer)(own_config, 0).float().eval()
    original.load_state_dict({name: tensor.float().cpu() for name, tensor in layer.state_dict().items()})
    hidden = torch.randn(1, 16, geometry.hidden_size, generator=torch.Generator().manual_seed(0))
    rotary = type(model.base_model.rotary_emb)(config=model.config)
    position = rotary(hidden, torch.arange(16)[None])
    mask = torch.full((16, 16), float("-inf")).triu(1)[None, None]
    expected, _ = original(hidden, position_embeddings=position, attention_mask=mask)
    got, _ = converted(hidden, position_embeddings=position, attention_mask=mask)
    error = float((got - expected).norm() / expected.norm())
    if not error < EXACT:
        raise ValueError(
            f"conversion of this {model.config.model_type} model is not exact at full budget (relative error "
            f"{error:.1e}, allowed {EXACT}): its attention does something this family's conversion does not know"
        )
    return error

"""Conversion of a pretrained model into one with latent attention: a pure function of model, options, statistics.

The original model is not touched and shares no memory with the result. Layers are converted one by one in
float32 (singular values in float64) and stored in the model's own dtype.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mha2mla import allocation, basis, low_rank, partial_rope
from mha2mla.bits import choose_format
from mha2mla.families import attention_layers, family_of, geometry_of, latent_layers
from mha2mla.finite import check_weights
from mha2mla.importance import IMPORTANCE
from mha2mla.layer import LayerReport, convert_layer, cut_layer
from mha2mla.modeling.cache_format_mla import format_bytes, mean_bits
from mha2mla.options import PER_HEAD, ConversionOptions, Geometry
from mha2mla.self_check import self_check
from mha2mla.statistics import Statistics
from mha2mla.target import build, chosen_layers, converted_config, rotations_of

TABLES: dict[str, Any] = {
    "partial_rope": partial_rope,
    "rope_basis": basis,
    "low_rank": low_rank,
    "rank_allocation": allocation,
}


@dataclass
class ConversionReport:
    """What a conversion did. Cache sizes are numbers a token a layer, in the mean over the layers; `reduction` is in
    bytes: of a cache of options.context tokens where it has a format, else of a token in any one dtype. bits: of a
    token's codes a layer, in the mean over those that are quantised."""

    options: ConversionOptions
    geometry: Geometry
    cache_size: float
    original_cache_size: int
    reduction: float
    self_check_error: float
    layers: list[LayerReport]
    latent_layers: list[int]  # which layers these are
    bits: float | None = None

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
    if options.importance not in IMPORTANCE:
        raise ValueError(f"importance={options.importance!r} is unknown; choose one of: {', '.join(IMPORTANCE)}")
    geometry = geometry_of(config)
    resolved = options.resolve(geometry)
    if resolved.partial_rope == "evenly-spaced" and resolved.rope_basis == "heads":
        raise ValueError(
            f"partial_rope=evenly-spaced needs rope_basis=principal, which {config.model_type} models cannot have: "
            "every key head has a norm of its own; use partial_rope=rotation-cost or one of the paper's"
        )
    chosen_layers(config, resolved)
    if resolved.rope != "full" and resolved.partial_rope not in partial_rope.NEEDS_CALIBRATION:
        assert resolved.rope_dim is not None
        partial_rope.STRATEGIES[resolved.partial_rope](partial_rope.Pairs(geometry, resolved.rope_dim // 2))
    return resolved


def needs_calibration(options: ConversionOptions) -> list[str]:
    """Those of the options that look at calibration text, as `name=value`."""
    chosen = {name: getattr(options, name) for name in TABLES}
    found = [f"{name}={value}" for name, value in chosen.items() if value in TABLES[name].NEEDS_CALIBRATION]
    return found + ([f"bits={options.bits}"] if options.bits != 16 else [])


def convert(
    model: Any,
    options: ConversionOptions,
    calibration: Statistics | None = None,
    on_layer: Callable[[int], None] | None = None,
    batches: Iterable[torch.Tensor] | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> tuple[Any, ConversionReport]:
    """Turn a decoder of a supported family (MHA, GQA or MQA) into its latent-attention counterpart.

    model: a base model or causal language model of transformers.
    calibration: from `collect_statistics`; needed by partial_rope="2-norm", otherwise it adds the errors on real
        activations to the report.
    on_layer: is told the index of every layer that was converted.
    batches: text that a cache format is chosen on where bits are fewer than 16, input_ids [B, S] without padding;
        on_tokens: is told how many tokens of it were read.
    Returns the converted model (same dtype, device and mode of training) and a report.
    Raises ValueError for an unsupported family, for sizes that do not fit, for weights that are not finite, and where
    calibration is missing.
    """
    family, options = family_of(model.config), resolve_options(model.config, options)
    geometry = options.cached(geometry_of(model.config))
    if needs_calibration(options) and calibration is None:
        wanting = ", ".join(needs_calibration(options))
        raise ValueError(f"{wanting}: looks at calibration text; pass calibration=collect_statistics(...)")
    if options.bits != 16 and batches is None:
        raise ValueError(f"bits={options.bits}: a cache format is chosen on calibration text; pass batches=...")
    check_weights(model.state_dict().items())
    error = self_check(model, options.rope)
    chosen, attentions, rotations = chosen_layers(model.config, options), attention_layers(model), rotations_of(model)
    ranks = allocate(model, options, calibration)
    config = converted_config(model.config, options, attentions[chosen[0]], ranks)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    replaced = tuple(f"{prefix}layers.{index}.{family.attention_name}." for index in chosen)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(replaced)}
    reports = []
    for index, own_prefix in zip(chosen, replaced, strict=True):
        statistics = calibration.layers[index] if calibration else None
        own = replace(options, kv_lora_rank=ranks[index])
        weights, report = convert_layer(attentions[index], geometry, own, rotations[index], statistics)
        state |= {own_prefix + name: tensor for name, tensor in weights.items()}
        reports.append(report)
        if on_layer:
            on_layer(index)
    target = family.model_class if model.base_model is model else family.causal_lm_class
    converted = build(target, config, state, model)
    found = conversion_report(model.config, options, ranks, error, reports)
    if options.bits != 16:
        assert batches is not None
        give_format(converted, geometry, options, batches, on_tokens)
        found = with_format(found, converted.config)
    return converted, found


def give_format(
    converted: Any,
    geometry: Geometry,
    options: ConversionOptions,
    batches: Iterable[torch.Tensor],
    on_tokens: Callable[[int], None] | None = None,
) -> None:
    """The cache format that the options ask for, in place."""
    layers = [attention for _, attention in latent_layers(converted)]
    budget = None
    if options.bits == "auto":
        budget = sum(options.channel_bits(geometry, layer.kv_lora_rank + layer.rope_dim) for layer in layers)
    choose_format(
        converted,
        batches,
        budget,
        None if options.bits == "auto" else int(options.bits),
        options.cache_scales,
        options.residual_length,
        options.importance,
        options.latent_basis == "loss",
        on_tokens,
    )


def with_format(report: ConversionReport, config: Any) -> ConversionReport:
    """A report with what the cache of a format holds."""
    context, layers = report.options.context, config.num_hidden_layers
    original = 2 * report.geometry.cache_size * context
    untouched = layers - len(report.latent_layers)
    reduction = 1 - (format_bytes(config, context) + untouched * original) / (layers * original)
    return replace(report, reduction=reduction, bits=mean_bits(config))


def conversion_report(
    config: Any, options: ConversionOptions, ranks: list[int], error: float, reports: list[LayerReport]
) -> ConversionReport:
    geometry, chosen = options.cached(geometry_of(config)), chosen_layers(config, options)
    beside, whole = options.cached_rope_dim + geometry.key_scales, geometry.cache_size
    sizes = [ranks[index] + beside if index in chosen else whole for index in range(config.num_hidden_layers)]
    size = sum(sizes) / len(sizes)
    return ConversionReport(options, geometry, size, whole, 1 - size / whole, error, reports, chosen)


def allocate(model: Any, options: ConversionOptions, calibration: Statistics | None) -> list[int]:
    """The rank of every layer's latent; of layers that stay as they are, the mean."""
    assert options.rope_dim is not None and options.kv_lora_rank is not None
    layers, chosen = attention_layers(model), chosen_layers(model.config, options)
    ranks = [options.kv_lora_rank] * len(layers)
    if options.rank_allocation == "uniform":
        return ranks
    geometry, rotations, energies = geometry_of(model.config), rotations_of(model), []
    full = geometry.full_rank(options.cached_rope_dim)
    for index in chosen:
        statistics = calibration.layers[index] if calibration else None
        stack = cut_layer(layers[index], geometry, options, rotations[index], statistics).stack
        energies.append(low_rank.energies(stack, options.low_rank)[:full])
    found = allocation.STRATEGIES[options.rank_allocation](energies, options.kv_lora_rank)
    for index, rank in zip(chosen, found, strict=True):
        ranks[index] = rank
    return ranks

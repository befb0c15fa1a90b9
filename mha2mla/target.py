"""What a conversion builds: the layers it takes, the converted model's configuration, and the model itself."""

import math
from typing import Any

import torch

from mha2mla.families import family_of, geometry_of
from mha2mla.finite import is_finite
from mha2mla.options import ConversionOptions
from mha2mla.projections import output_projection, read_projections
from mha2mla.rotation import Rotation, shares_rotated_key

LEFT_BEHIND = ("model_type", "architectures", "auto_map", "transformers_version", "quantization_config")


def chosen_layers(config: Any, options: ConversionOptions) -> list[int]:
    """Numbers of the layers that get latent attention."""
    number = config.num_hidden_layers
    if options.layers == "all":
        return list(range(number))
    chosen = [index for index in range(number) if not slides(config, index)]
    if not chosen:
        raise ValueError("layers=full-attention: every layer of this model has a sliding window; use layers=all")
    return chosen


def rotations_of(model: Any) -> list[Rotation]:
    """Every layer's rotary embedding as scaled by its family (YaRN and LongRoPE also put a factor on cos and sin).

    Layers that turn alike share one object, since measuring one over a long context takes a while.
    """
    return rotations(rotary_of(model.base_model), model.config)


def rotary_of(decoder: Any) -> Any:
    """A decoder's rotary embedding, or one like it where a change of the model's dtype has rounded its frequencies: a
    saved model would not have them rounded, and some hundred tokens on they are off by a radian."""
    rotary = decoder.rotary_emb
    frequencies = list(rotary.buffers())
    if all(each.dtype == torch.float32 for each in frequencies):
        return rotary
    return type(rotary)(config=decoder.config).to(frequencies[0].device)


def rotations(rotary: Any, config: Any) -> list[Rotation]:
    found: dict[Any, Rotation] = {}
    kinds = [
        (*layer_kind(rotary, config, index), context_of(config, index)) for index in range(config.num_hidden_layers)
    ]
    for kind in set(kinds):
        name, rotates, context = kind
        prefix = f"{name}_" if name else ""
        frequencies = getattr(rotary, f"{prefix}inv_freq").float()
        scale = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
        if not is_finite(frequencies) or not math.isfinite(scale):
            raise ValueError(f"rotary frequencies are not finite with rope_parameters={config.rope_parameters}")
        if not rotates:
            frequencies, scale = torch.zeros_like(frequencies), 1.0
        found[kind] = Rotation(frequencies, scale, context)
    return [found[kind] for kind in kinds]


def context_of(config: Any, index: int) -> int:
    """The farthest that layer `index` looks back, in tokens: its window, or all positions."""
    longest, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    return min(longest, window) if window and slides(config, index) else longest


def slides(config: Any, index: int) -> bool:
    """Whether layer `index` attends to a sliding window."""
    types = getattr(config, "layer_types", None)
    return types[index] == "sliding_attention" if types else bool(getattr(config, "sliding_window", None))


def layer_kind(rotary: Any, config: Any, index: int) -> tuple[str | None, bool]:
    """What distinguishes a layer's rotation: the type that its frequencies belong to, if types have their own
    (Gemma 3), and whether it rotates at all (SmolLM3)."""
    types = getattr(config, "layer_types", None)
    name = types[index] if types and hasattr(rotary, f"{types[index]}_inv_freq") else None
    rotating = getattr(config, "no_rope_layers", None)
    return name, rotating is None or bool(rotating[index])


def rotate_positions(model: Any, states: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, S, rotary size] that layer `index` of a decoder gets for states [B, S, d] from position 0."""
    positions = torch.arange(states.shape[1], device=states.device)[None]
    rotary = rotary_of(model)
    name, _ = layer_kind(rotary, model.config, index)
    return rotary(states, positions) if name is None else rotary(states, positions, name)


def converted_config(config: Any, options: ConversionOptions, attention: Any, ranks: list[int] | None = None) -> Any:
    """The family's MLA configuration: everything of the original, and the sizes of the latent attention.

    attention: one of the original's modules, for what only it says: the factor on scores, biases, norms.
    """
    own_ranks = ranks if options.rank_allocation != "uniform" else None
    family, geometry = family_of(config), geometry_of(config)
    kept = {name: value for name, value in config.to_dict().items() if name not in LEFT_BEHIND}
    assert options.rope_dim is not None
    whole = read_projections(attention, geometry)
    size, late = geometry.head_dim, options.rope != "partial"
    one_key = late or bool(geometry.key_scales) or shares_rotated_key(options)
    rotated = options.cached_rope_dim if one_key else options.cached_rope_dim // geometry.num_kv_heads
    norms = {}
    if whole.norms is not None:
        norms = {"qk_norm": True, "qk_norm_joint": whole.norms.joint, "qk_norm_eps": whole.norms.eps}
        norms["key_scales"] = options.cached(geometry).key_scales
    chosen = chosen_layers(config, options)
    return family.config_class(
        **kept
        | {
            # Saving adds the class that is saved; serving engines also look for the decoder alone.
            "auto_map": {"AutoModel": f"{family.model_class.__module__.split('.')[-1]}.{family.model_class.__name__}"},
            "head_dim": size,
            "num_key_value_heads": geometry.num_kv_heads,
            "rotary_dim": geometry.rotary_dim,
            "rope_full": options.rope == "full",
            "latent_rope_dim": options.rope_dim - options.cached_rope_dim,
            "kv_lora_rank": options.kv_lora_rank,
            "layer_kv_lora_rank": own_ranks,
            "latent_layers": None if len(chosen) == config.num_hidden_layers else chosen,
            "q_lora_rank": options.q_lora_rank,
            "num_rope_heads": 1 if one_key else geometry.num_kv_heads,
            "qk_rope_head_dim": rotated,
            "qk_nope_head_dim": size if one_key else size - rotated,
            "v_head_dim": size,
            "softmax_scale": float(attention.scaling),
            "q_proj_bias": whole.biased,
            "kv_a_proj_bias": whole.biased and not late,
            "o_proj_bias": whole.biased or output_projection(attention).bias is not None,
        }
        | norms
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
    restore_buffers(converted, original)
    tie_like(converted, original)
    converted.train(original.training)
    if getattr(original, "generation_config", None) is not None:
        converted.generation_config = original.generation_config
    return converted


def tie_like(model: Any, original: Any) -> None:
    """Share the weight of output layer and embedding where `original` does, whatever its configuration says: a
    checkpoint with an output layer of its own keeps it."""
    if (head := original.get_output_embeddings()) is not None:
        model.config.tie_word_embeddings = head.weight is original.get_input_embeddings().weight
    model.tie_weights()


def restore_buffers(converted: Any, original: Any) -> None:
    """Buffers that no checkpoint holds (Gemma's factor on embeddings), from the original."""
    theirs = dict(original.named_buffers())
    for name, buffer in converted.named_buffers():
        if buffer.is_meta:
            module, _, last = name.rpartition(".")
            setattr(converted.get_submodule(module), last, theirs[name].detach().clone())

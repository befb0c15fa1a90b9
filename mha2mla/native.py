"""A converted model as a native DeepSeek-V3 one, which transformers' own `DeepseekV3ForCausalLM` loads, and whatever
else reads that layout (arXiv 2412.19437; vLLM, SGLang, llama.cpp).

What DeepSeek's attention has and ours has not is made harmless, exactly: the norm on the latent by making the latent
so small that its epsilon is all that counts, and the softmax factor and the norms' epsilon by factors on weights.
What ours has and DeepSeek's has not (biases, norms on queries and keys, frequencies off the grid) cannot be said in
that layout, and `obstacles` names it.
Shapes: d hidden size, H query heads, G key/value heads, r, R, K, V as in modeling/attention_mla.py; N = 1.
"""

from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from mha2mla.engines import cache_obstacles, refuse_half, whole_query

EPS = 1e-6  # of DeepSeek's norm on the latent, whatever rms_norm_eps says; so all norms get it
SHRINK = 2.0**-20  # of latents: their mean square then lies far below EPS
GROW = 2.0**10  # the norm's weight: a power of two near sqrt(EPS) / SHRINK, which bfloat16 holds exactly
PLAIN = {"llama_mla", "mistral_mla", "qwen2_mla", "phi3_mla", "granite_mla"}
MORE = {
    "gemma2_mla": "norms behind its layers and caps on scores and logits",
    "smollm3_mla": "layers that do not rotate",
    "gpt_neox_mla": "parallel branches and norms that subtract a mean",
    "mixtral_mla": "experts chosen by another rule",
}


def obstacles(config: Any) -> list[str]:
    """What keeps a converted model's configuration from being said as DeepSeek-V3's; empty if nothing does."""
    found = cache_obstacles(config)
    if not config.key_scales and config.model_type not in PLAIN:
        found.append(f"{MORE.get(config.model_type, 'layers of another form')}, which DeepSeek-V3's layers have not")
    if config.q_proj_bias or config.kv_a_proj_bias or config.o_proj_bias:
        found.append("biases in the attention, which engines leave out without a word")
    if getattr(config, "mlp_bias", False):
        found.append("biases in the feed-forward layers")
    rope = config.rope_parameters.get("rope_type", "default")
    if rope != "default":
        found.append(f"rope_type={rope}, which engines read as another scaling")
    return found


def require_grid(pairs: torch.Tensor, frequencies: int) -> None:
    """ValueError unless pairs [R / 2] are every n-th of the model's frequencies."""
    kept = sorted(pairs.tolist())
    step = frequencies // len(kept) if len(kept) <= frequencies else 0
    if not step or kept != list(range(0, frequencies, step)):
        raise ValueError(
            f"no native export: the rotated pairs are frequencies {kept[:6]}… of {frequencies}, not every n-th; "
            "convert with partial_rope=evenly-spaced rope_basis=principal"
        )


@torch.no_grad()
def to_deepseek(model: Any) -> DeepseekV3ForCausalLM:
    """The same function as a `DeepseekV3ForCausalLM`, in the model's dtype; it shares no weights with `model`.

    Queries, keys and norms agree to rounding: 1e-6 relative on logits in float32. In bfloat16 factors that are no
    powers of two round once more. The cache holds as many numbers, in 16 bits: that layout has no cache format. The
    heads are written out one by one.
    Raises ValueError with everything that layout cannot say.
    """
    config = model.config
    refuse_half(model, "native export")
    if found := obstacles(config):
        raise ValueError(f"no native export of this {config.model_type} model: it has " + "; ".join(found))
    size = config.rotary_dim or config.head_dim
    scale = (EPS / config.rms_norm_eps) ** 0.5  # of the residual stream, so that norms with EPS do what its own did
    into, out_of = getattr(config, "embedding_multiplier", 1.0), getattr(config, "logits_scaling", 1.0)
    branch = scale * getattr(config, "residual_multiplier", 1.0)
    decoder = model.model
    state = {
        "model.embed_tokens.weight": decoder.embed_tokens.weight * (scale * into),
        "model.norm.weight": decoder.norm.weight,
        "lm_head.weight": model.lm_head.weight / out_of,
    }
    for index, layer in enumerate(decoder.layers):
        prefix = f"model.layers.{index}."
        require_grid(layer.self_attn.rope_pair_index[0], size // 2)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{name}.weight"] = getattr(layer, name).weight
        gate, up = gate_and_up(layer.mlp)
        state |= {f"{prefix}mlp.gate_proj.weight": gate, f"{prefix}mlp.up_proj.weight": up}
        state[f"{prefix}mlp.down_proj.weight"] = layer.mlp.down_proj.weight * branch
        state |= {f"{prefix}self_attn.{name}": w for name, w in attention_state(layer.self_attn, branch).items()}
    with torch.device("meta"):
        native = DeepseekV3ForCausalLM._from_config(native_config(config), dtype=model.dtype)
    native.model.rotary_emb = type(native.model.rotary_emb)(config=native.config)
    native.load_state_dict({name: w.detach().to(model.dtype).clone() for name, w in state.items()}, assign=True)
    native.generation_config = model.generation_config
    return native.to(model.device).eval()


def native_config(config: Any) -> DeepseekV3Config:
    """A dense DeepSeek-V3 without query factors: its first layers without experts are all there are."""
    more: dict[str, Any] = {"moe_layer_freq": 1}  # which engines read and transformers does not
    return DeepseekV3Config(
        **more,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        kv_lora_rank=config.kv_lora_rank,
        q_lora_rank=None,
        qk_rope_head_dim=config.qk_rope_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        v_head_dim=config.v_head_dim,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]},
        first_k_dense_replace=config.num_hidden_layers,
        n_routed_experts=1,
        n_shared_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=config.intermediate_size,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        num_mtp_layers=0,
        tie_word_embeddings=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def gate_and_up(mlp: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj.weight.chunk(2)
        return gate, up
    return mlp.gate_proj.weight, mlp.up_proj.weight


def attention_state(attention: Any, branch: float) -> dict[str, torch.Tensor]:
    """One layer's attention under DeepSeek's names; computed in float32."""
    heads, groups = attention.num_heads, attention.num_key_value_heads
    nope, rank = attention.qk_nope_head_dim, attention.kv_lora_rank
    query = whole_query(attention).view(heads, attention.qk_head_dim, -1)
    query = query * (attention.scaling * attention.qk_head_dim**0.5)
    order = torch.argsort(attention.rope_pair_index[0])
    latent, rotated = attention.kv_a_proj_with_mqa.weight.float().split([rank, attention.rope_dim])
    up = attention.kv_b_proj.weight.float().view(groups, -1, rank).repeat_interleave(heads // groups, 0)
    return {
        "q_proj.weight": torch.cat((query[:, :nope], interleaved(query[:, nope:], order)), dim=1).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat((latent * SHRINK, interleaved(rotated[None], order)[0])),
        "kv_a_layernorm.weight": torch.full((rank,), GROW, device=latent.device),
        # What the norm makes of a shrunken latent is latent * SHRINK / sqrt(EPS) * GROW.
        "kv_b_proj.weight": up.flatten(0, 1) * (EPS**0.5 / (SHRINK * GROW)),
        "o_proj.weight": attention.o_proj.weight.float() * branch,
    }


def interleaved(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rotated rows [heads, R, d], first components of all pairs before second ones, pair by pair and by frequency."""
    first, second = rows.chunk(2, dim=1)
    return torch.stack((first[:, order], second[:, order]), dim=2).flatten(1, 2)

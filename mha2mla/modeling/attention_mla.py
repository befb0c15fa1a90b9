"""Multi-head Latent Attention over a converted model's weights (DeepSeek-V2, arXiv 2405.04434, section 2.1).

One module, two forwards of the same function:

- expanded (training, prefill): the latent is projected up to keys and values of every key/value head;
- absorbed (decode): the up-projections move into the query and the output, and all query heads attend
  the latent itself, so a step reads r + R numbers a cached token and writes nothing back.

Which of the two runs follows from the number of queries: `absorbs` compares their costs.

Shapes: B batch, S new tokens, T cached tokens, H query heads, G key/value heads, N rotated keys (1 or G),
r kv_lora_rank, P qk_rope_head_dim, R = N * P, K qk_nope_head_dim, V v_head_dim.
The cache holds two slots: the latent [B, 1, T, r] and the rotated key [B, 1, T, R] (after rotation). One that keeps
them in few bits hands out what can be attended to without decoding it (quantized_cache_mla.py).
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward  # with soft-capping

from .cache_format_mla import CacheTables, LayerFormat, layer_format


class MLAAttention(nn.Module):
    """Latent attention in place of a family's own; takes and returns what that one does."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.num_rope_heads = config.num_rope_heads
        ranks = config.layer_kv_lora_rank
        self.kv_lora_rank = config.kv_lora_rank if ranks is None else ranks[layer_idx]
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_head_dim
        self.v_head_dim = config.v_head_dim
        self.rope_dim = config.rope_dim
        self.key_scales = config.key_scales
        self.cached_size = self.kv_lora_rank + self.rope_dim + self.key_scales
        self.scaling = config.softmax_scale
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.softcap = getattr(config, "attn_logit_softcapping", None)
        rotating = getattr(config, "no_rope_layers", None)
        self.rotates = rotating is None or bool(rotating[layer_idx])
        layer_types = getattr(config, "layer_types", None)
        slides = layer_types is None or layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = getattr(config, "sliding_window", None) if slides else None

        d, query_size = config.hidden_size, self.num_heads * self.query_size
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(d, query_size, bias=config.q_proj_bias)
        else:
            self.q_a_proj = nn.Linear(d, config.q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_size, bias=config.q_proj_bias)
        self.kv_a_proj_with_mqa = nn.Linear(d, self.kv_lora_rank + self.projected_rope, bias=config.kv_a_proj_bias)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, self.expanded_size, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, d, bias=config.o_proj_bias)
        self.rope_pair_index: torch.Tensor
        # Which of the model's rotary frequencies each pair of each rotated key turns with; saved with the weights.
        pairs = torch.arange(self.qk_rope_head_dim // 2).expand(self.num_rope_heads, -1)
        self.register_buffer("rope_pair_index", pairs.clone())
        form = layer_format(config, layer_idx)
        self.cache_tables = None if form is None else self.tables_for(form)

    def tables_for(self, form: LayerFormat) -> CacheTables:
        """Tables of a format for what this layer caches, not fitted yet."""
        return CacheTables(form, self.num_rope_heads, self.qk_rope_head_dim)

    @property
    def query_size(self) -> int:
        """Numbers of a head that the query projection gives."""
        return self.qk_head_dim

    @property
    def expanded_size(self) -> int:
        """Numbers that come out of a latent."""
        return self.num_key_value_heads * (self.qk_nope_head_dim + self.v_head_dim)

    @property
    def projected_rope(self) -> int:
        """Numbers of the rotated key that come out of the same projection as the latent."""
        return self.rope_dim

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        past_key_values = layer_past if past_key_values is None else past_key_values  # GPT-NeoX's name for it
        cos, sin = self.layer_rotation(*position_embeddings)
        q_nope, q_rot = self.project_queries(hidden_states, cos, sin)
        latent: Any
        k_rot: Any
        latent, k_rot = self.project_latents(hidden_states, cos, sin)
        if past_key_values is not None:
            extra: dict[str, Any] = {}
            if self.cache_tables is not None:  # caches that are not quantised take no notice of it
                rotation = position_embeddings if self.rotates else None
                extra = {"tables": self.cache_tables, "rotation": rotation, "pairs": self.rope_pair_index}
                extra["position_ids"] = kwargs.get("position_ids")
            latent, k_rot = past_key_values.update(latent, k_rot, self.layer_idx, **extra)
        else:
            latent, k_rot = self.quantize(latent, k_rot, (cos, sin), kwargs.get("position_ids"))
        q_nope, q_rot = self.place_queries(q_nope, q_rot, latent.shape[2], past_key_values)

        if past_key_values is not None and self.absorbs(length) and is_score_mask(attention_mask):
            output, weights = self.attend_latent(q_nope, q_rot, latent, k_rot, attention_mask)
        else:
            keys, values = self.expand_kv(*(state if is_whole(state) else state.dense() for state in (latent, k_rot)))
            if self.softcap is not None:
                kwargs["softcap"] = self.softcap
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            if self.sliding_window is not None:
                kwargs["sliding_window"] = self.sliding_window
            missing = self.qk_head_dim - self.v_head_dim
            if missing > 0 and self.config._attn_implementation == "sdpa":
                # Its fast kernels want equal sizes; without them a training step on the CPU takes twice as long.
                values = nn.functional.pad(values, (0, missing))
            else:
                # Behind the keys' part of the same tensor, values can start where CUDA's kernels must not read.
                values = values.contiguous()
            output, weights = attend(
                self,
                torch.cat((q_nope, q_rot), dim=-1),
                keys,
                values,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
            output = output[..., : self.v_head_dim]
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def layer_rotation(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From the model's rotation [B, S, rotary size] the part of this layer's pairs, [B, S, N, P / 2]."""
        cos, sin = cos[..., self.rope_pair_index], sin[..., self.rope_pair_index]
        return (cos, sin) if self.rotates else (torch.ones_like(cos), torch.zeros_like(sin))

    def query_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The query projection [B, S, H, ..]."""
        query = self.q_proj(hidden_states) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_proj(hidden_states))
        return query.unflatten(-1, (self.num_heads, -1))

    def project_queries(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of new tokens: [B, H, S, K] and, rotated, [B, H, S, P]."""
        q_nope, q_rot = self.query_rows(hidden_states).split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        heads_per_rope = self.num_heads // self.num_rope_heads
        q_rot = rotate(q_rot, cos.repeat_interleave(heads_per_rope, 2), sin.repeat_interleave(heads_per_rope, 2))
        return q_nope.transpose(1, 2), q_rot.transpose(1, 2)

    def project_latents(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache takes of new tokens: latents [B, 1, S, r] and rotated keys [B, 1, S, R]."""
        latent, k_rot = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.rope_dim], dim=-1)
        k_rot = rotate(k_rot.unflatten(-1, (self.num_rope_heads, self.qk_rope_head_dim)), cos, sin)
        return latent.unsqueeze(1), k_rot.flatten(2).unsqueeze(1)

    def place_queries(
        self, q_nope: torch.Tensor, q_rot: torch.Tensor, slots: int, past_key_values: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, H, S, K] and [B, H, S, P] as they meet the keys of so many slots, when the cache has taken their
        own."""
        return q_nope, q_rot

    def quantize(
        self,
        latent: torch.Tensor,
        k_rot: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        position_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, 1, S, r] and rotated keys [B, 1, S, R + ..] as a cache of the model's format gives them back."""
        if self.cache_tables is None:
            return latent, k_rot
        k_rot, rest = k_rot.split([self.rope_dim, self.key_scales], -1)
        mean = rotate(self.cache_tables.key_mean, *rotation).flatten(2).unsqueeze(1)
        channels = self.cache_tables(torch.cat((latent, k_rot - mean.to(k_rot.dtype)), -1), position_ids)
        latent, k_rot = channels.split([self.kv_lora_rank, self.rope_dim], -1)
        return latent, torch.cat((k_rot + mean.to(k_rot.dtype), rest), -1)

    def expand_kv(self, latent: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, G, T, K + P] and values [B, G, T, V] from the cached latent [B, 1, T, r] and key [B, 1, T, R]."""
        batch, _, length, _ = latent.shape
        kv = self.kv_b_proj(latent).view(batch, length, self.num_key_value_heads, -1).transpose(1, 2)
        k_nope, values = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rot = k_rot.view(batch, length, self.num_rope_heads, self.qk_rope_head_dim).transpose(1, 2)
        return torch.cat((k_nope, k_rot.expand(-1, self.num_key_value_heads, -1, -1)), dim=-1), values

    def absorbs(self, queries: int) -> bool:
        """Whether attending the latent is possible and costs fewer multiplications a cached token than expanding it."""
        if not is_its_weight(self.kv_b_proj):
            return False
        expand = self.kv_lora_rank * self.num_key_value_heads * (self.qk_nope_head_dim + self.v_head_dim)
        expanded = expand + queries * self.num_heads * (self.qk_head_dim + self.v_head_dim)
        return queries * self.num_heads * (2 * self.kv_lora_rank + self.rope_dim) < expanded

    def attend_latent(
        self,
        q_nope: torch.Tensor,
        q_rot: torch.Tensor,
        latent: Any,
        k_rot: Any,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Absorbed attention of q_nope [B, H, S, K] and q_rot [B, H, S, P]; output [B, S, H, V], weights [B, H, S, T].

        All heads' queries are rows against one shared key, so each product is one matrix multiplication.
        """
        batch, heads, length, _ = q_nope.shape
        groups = self.num_key_value_heads
        _, w_value = self.up_projections()
        scores = self.score_latent(q_nope, q_rot, latent, k_rot).view(batch, heads, length, -1)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is None and length > 1:
            # transformers leaves the mask out of a prompt without a prefix: query i sees keys 0..i.
            mask = torch.ones(length, scores.shape[-1], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            # In place: scores are as long as the cache, and passes over them are what a step has to spare.
            scores += score_bias(mask, scores.dtype)
        weights = scores.softmax(dim=-1)  # summed in float32 whatever the dtype
        dropped = nn.functional.dropout(weights, self.attention_dropout, self.training)

        rows = dropped.view(batch, heads * length, -1)
        mixed = rows @ latent[:, 0] if is_whole(latent) else latent.mix(rows)
        mixed = mixed.view(batch, groups, -1, self.kv_lora_rank)
        output = torch.einsum("bgqr,gvr->bgqv", mixed, w_value).reshape(batch, heads, length, self.v_head_dim)
        return output.transpose(1, 2), weights

    def up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What makes keys [G, K, r] and values [G, V, r] of a latent."""
        groups, sizes = self.num_key_value_heads, [self.qk_nope_head_dim, self.v_head_dim]
        heads = self.kv_b_proj.weight[: groups * sum(sizes)]
        w_key, w_value = heads.view(groups, sum(sizes), -1).split(sizes, dim=1)
        return w_key, w_value

    def score_latent(self, q_nope: torch.Tensor, q_rot: torch.Tensor, latent: Any, k_rot: Any) -> torch.Tensor:
        """Scaled scores [B, H * S, T] of q_nope [B, H, S, K] and q_rot [B, H, S, P] with all that is cached."""
        batch, heads, length, _ = q_nope.shape
        groups = self.num_key_value_heads
        # Sizes in full: none can be worked out from no numbers, which is what K = 0 leaves where all pairs rotate.
        grouped = q_nope.reshape(batch, groups, heads // groups * length, self.qk_nope_head_dim)
        w_key, _ = self.up_projections()
        q_latent = torch.einsum("bgqk,gkr->bgqr", grouped, w_key).reshape(batch, heads * length, self.kv_lora_rank)
        q_rows = self.rope_rows(q_rot).flatten(1, 2)
        # Scaled before the products: queries are few, scores are many.
        return self.score(q_latent * self.scaling, q_rows * self.scaling, latent, k_rot)

    def score(self, q_latent: torch.Tensor, q_rows: torch.Tensor, latent: Any, k_rot: Any) -> torch.Tensor:
        """Scores [B, H * S, T] of rows [B, H * S, r] and [B, H * S, R] with all that is cached."""
        if not is_whole(latent):
            return k_rot.dot(q_rows) + latent.dot(q_latent)
        scores = torch.bmm(q_rows, k_rot[:, 0].transpose(1, 2))
        return torch.baddbmm(scores, q_latent, latent[:, 0].transpose(1, 2))

    def rope_rows(self, q_rot: torch.Tensor) -> torch.Tensor:
        """Rotated queries [B, H, S, P] as rows [B, H, S, R] against all rotated keys: zero at other heads' keys."""
        if self.num_rope_heads == 1:
            return q_rot
        batch, heads, length, size = q_rot.shape
        grouped = q_rot.view(batch, self.num_rope_heads, -1, length, 1, size)
        own = torch.eye(self.num_rope_heads, dtype=q_rot.dtype, device=q_rot.device)
        return (grouped * own[:, None, None, :, None]).view(batch, heads, length, self.rope_dim)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, S, heads, 2 * pairs] whose halves are the pairs' components; cos, sin [.., pairs]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)  # OLMo 2 rotates in float32


def is_its_weight(layer: nn.Module) -> bool:
    """Whether a linear layer is its weight and nothing more: only then can the weight stand for it in a product.

    One that is more can only be called: an adapter; a layer or weight tensor of a quantisation library; a weight that
    a hook or parametrization computes, or that offloading or sharding brings only for the call.
    """
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or layer._forward_pre_hooks or layer._forward_hooks:
        return False
    weight = layer.weight
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()
    return plain and not weight.is_meta and weight.shape == (layer.out_features, layer.in_features)


def is_whole(states: Any) -> bool:
    """Whether cached states are a tensor. A quantised cache hands out objects with `dense`, `dot` and `mix` instead."""
    return isinstance(states, torch.Tensor)


def score_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as numbers to add to scores; a boolean one is True where a query sees a key.

    Never below half of what the dtype holds: a sum with a score would else be minus infinity, and a query that sees
    nothing, which padding is, not a number.
    """
    least = torch.finfo(dtype).min / 2
    if mask.dtype != torch.bool:
        return mask.clamp(min=least).to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, least)


def is_score_mask(mask: Any) -> bool:
    """Whether a mask is of the kind that scores [B, H, S, T] can take: none, or a tensor of that rank."""
    return mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4)

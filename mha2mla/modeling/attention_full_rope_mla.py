"""Latent attention whose keys all rotate after the latent, which holds them un-rotated beside the values.

Keys are made from the latent, normed where the family norms them (Qwen3, Gemma 3, OLMo 2) and only then rotated, so at
full rank nothing is lost, and truncating or quantising the latent is all that is (Palu, arXiv 2407.21118; KVTC, arXiv
2511.01815). It is slow to decode: rotation stands between query and latent, so the keys' up-projection cannot move
into the query, and every step rebuilds and rotates the keys of all cached tokens. The values' still moves into the
output. Shapes as in attention_mla.py with R = P = 0 and K = D.
"""

from typing import Any

import torch
from torch import nn

from .attention_late_rope_mla import LateRopeMLAAttention
from .attention_mla import is_its_weight, is_whole
from .attention_normed_mla import HeadNorm


class FullRopeMLAAttention(LateRopeMLAAttention):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        groups, size = self.num_key_value_heads, config.head_dim
        # A bias of keys that rotate does not cancel in the softmax.
        self.key_bias = nn.Parameter(torch.zeros(groups * size)) if config.q_proj_bias else None
        self.q_norm, self.k_norm = (
            HeadNorm(heads, size, config.qk_norm_joint, config.qk_norm_eps) if config.qk_norm else None
            for heads in (self.num_heads, groups)
        )

    @property
    def num_frequencies(self) -> int:
        return (self.config.rotary_dim or self.config.head_dim) // 2

    def project_queries(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, H, S, D], not rotated: the cache tells which slots they are in. And [B, H, S, 0]."""
        query = self.query_rows(hidden_states)
        query = (query if self.q_norm is None else self.q_norm(query)[0]).transpose(1, 2)
        return query, query[..., :0]

    def place_queries(
        self, q_nope: torch.Tensor, q_rot: torch.Tensor, slots: int, past_key_values: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotate_queries(q_nope, slots, past_key_values), q_rot

    def expand_kv(self, latent: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, G, T, D], rotated by their slots 0..T - 1, and values [B, G, T, V] from the latent [B, 1, T, r]."""
        kv = self.kv_b_proj(latent[:, 0]).unflatten(-1, (self.num_key_value_heads, -1))
        keys, values = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return self.finish_keys(keys), values.transpose(1, 2)

    def finish_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys [B, T, G, D] out of the latent with bias, norm and rotation, [B, G, T, D]."""
        if self.key_bias is not None:
            keys = keys + self.key_bias.view(keys.shape[-2:])
        if self.k_norm is not None:
            keys = self.k_norm(keys)[0]
        return self.rotate_slots(keys, torch.arange(keys.shape[1], device=keys.device)).transpose(1, 2)

    def absorbs(self, queries: int) -> bool:
        """Whether values are better mixed as latents. Keys are made from them either way."""
        mixing = queries * self.num_heads
        expanded = (self.kv_lora_rank * self.num_key_value_heads + mixing) * self.v_head_dim
        return is_its_weight(self.kv_b_proj) and mixing * self.kv_lora_rank < expanded

    def score_latent(self, q_nope: torch.Tensor, q_rot: torch.Tensor, latent: Any, k_rot: Any) -> torch.Tensor:
        batch, heads, length, size = q_nope.shape
        up = self.up_projections()[0].flatten(0, 1)
        keys = latent[:, 0] @ up.T if is_whole(latent) else latent.dot(up.expand(batch, -1, -1)).mT
        keys = self.finish_keys(keys.unflatten(-1, (self.num_key_value_heads, size)))
        grouped = q_nope.reshape(batch, self.num_key_value_heads, -1, size) * self.scaling
        return (grouped @ keys.mT).reshape(batch, heads * length, -1)

"""Latent attention whose keys all rotate: the latent holds un-rotated keys and values, and no rotated key is cached.

Keys are made from the latent, normed where the family norms them (Qwen3, Gemma 3, OLMo 2) and only then rotated, so at
full rank nothing is lost, and truncating or quantising the latent is all that is (Palu, arXiv 2407.21118; KVTC, arXiv
2511.01815). It is slow to decode: rotation stands between query and latent, so the keys' up-projection cannot move
into the query, and every step rebuilds and rotates the keys of all cached tokens.

A cached latent has no position. None is needed: scores depend on distances alone, and the tokens of a row lie side by
side in the cache, whatever is padded to their left. Everything rotates by its slot, from the layer's own frequencies.
Shapes as in attention_mla.py with R = P = 0 and K = D; F rotary pairs a head.
"""

from typing import Any

import torch
from torch import nn

from .attention_mla import MLAAttention, rotate
from .attention_normed_mla import HeadNorm


class FullRopeMLAAttention(MLAAttention):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        groups, size = self.num_key_value_heads, config.head_dim
        # A bias of keys that rotate does not cancel in the softmax: it is added before they do.
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, groups * (size + self.v_head_dim), bias=config.q_proj_bias)
        if config.qk_norm:
            self.q_norm = HeadNorm(self.num_heads, size, config.qk_norm_joint, config.qk_norm_eps)
            self.k_norm = HeadNorm(groups, size, config.qk_norm_joint, config.qk_norm_eps)
        self.rope_frequencies: torch.Tensor
        # Float32 numbers, in radians a token, by their bits: a model in half precision must not round them.
        frequencies = torch.zeros((config.rotary_dim or size) // 2, dtype=torch.int32)
        self.register_buffer("rope_frequencies", frequencies)

    def project_queries(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, H, S, D], not rotated: the cache tells which slots they are in. And [B, H, S, 0]."""
        query = self.query_rows(hidden_states)
        query = (self.q_norm(query)[0] if self.config.qk_norm else query).transpose(1, 2)
        return query, query[..., :0]

    def project_latents(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        latent = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        return latent, latent[..., :0]

    def expand_kv(self, latent: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, G, T, D], rotated by their slots 0..T − 1, and values [B, G, T, V] from the latent [B, 1, T, r]."""
        kv = self.kv_b_proj(latent[:, 0]).unflatten(-1, (self.num_key_value_heads, -1))
        keys, values = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        keys = self.k_norm(keys)[0] if self.config.qk_norm else keys
        keys = self.rotate_slots(keys, torch.arange(keys.shape[1], device=keys.device))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def place_queries(self, query: torch.Tensor, keys: torch.Tensor, past_key_values: Any) -> torch.Tensor:
        length, slots = query.shape[2], keys.shape[2]
        filled = torch.tensor(slots, device=query.device)
        if past_key_values is not None:
            # Static caches hand out slots that are still empty; those of a window have seen more tokens than they hold.
            seen = torch.as_tensor(past_key_values.get_seq_length(self.layer_idx), device=query.device)
            filled = torch.minimum(filled, seen)
        own = filled - length + torch.arange(length, device=query.device)
        return self.rotate_slots(query.transpose(1, 2), own).transpose(1, 2)

    def rotate_slots(self, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Queries or keys [B, S, heads, D] rotated by their slots [S]; angles and rotation in float32."""
        frequencies = self.rope_frequencies.view(torch.float32)
        angles = (slots.float()[:, None] * frequencies)[:, None]
        turning = 2 * len(frequencies)
        turned = rotate(rows[..., :turning], angles.cos(), angles.sin())
        return torch.cat((turned, rows[..., turning:]), dim=-1)

    def absorbs(self, queries: int) -> bool:
        return False

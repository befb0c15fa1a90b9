"""Latent attention whose rotated key is made from the latent too: the cache holds nothing beside it.

As in DeepSeek's, one rotated key of P numbers serves all heads, and what does not rotate stays absorbed in the query.
But a step makes the rotated key of every cached token from its latent, un-rotated, and rotates it then: P rows of one
product more, where heads that all rotate would take G * D. Shapes as in attention_mla.py with R = 0.
"""

from typing import Any

import torch
from torch import nn

from .attention_late_rope_mla import LateRopeMLAAttention
from .attention_mla import is_its_weight, is_whole


class LatentRopeMLAAttention(LateRopeMLAAttention):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        # A bias of keys that rotate does not cancel in the softmax.
        self.key_bias = nn.Parameter(torch.zeros(self.made_rope)) if config.q_proj_bias else None

    @property
    def made_rope(self) -> int:
        """P: numbers of the rotated key that a latent gives."""
        return int(self.config.latent_rope_dim)

    @property
    def num_frequencies(self) -> int:
        return self.made_rope // 2

    @property
    def expanded_size(self) -> int:
        return super().expanded_size + self.made_rope

    def project_queries(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, H, S, K], and [B, H, S, P] that are not rotated yet: the cache tells which slots they are in."""
        query = self.query_rows(hidden_states).transpose(1, 2)
        q_nope, q_rot = query.split([self.qk_nope_head_dim, self.made_rope], dim=-1)
        return q_nope, q_rot

    def place_queries(
        self, q_nope: torch.Tensor, q_rot: torch.Tensor, slots: int, past_key_values: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return q_nope, self.rotate_queries(q_rot, slots, past_key_values)

    def expand_kv(self, latent: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, G, T, K + P] and values [B, G, T, V] from the latent [B, 1, T, r]."""
        kv, key = self.kv_b_proj(latent[:, 0]).split([super().expanded_size, self.made_rope], dim=-1)
        kv = kv.unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        k_nope, values = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rot = self.finish_key(key)[:, None]
        return torch.cat((k_nope, k_rot.expand(-1, self.num_key_value_heads, -1, -1)), dim=-1), values

    def finish_key(self, key: torch.Tensor) -> torch.Tensor:
        """The key [B, T, P] out of the latent with bias and rotation by its slot."""
        if self.key_bias is not None:
            key = key + self.key_bias
        return self.rotate_slots(key[:, :, None], torch.arange(key.shape[1], device=key.device))[:, :, 0]

    def absorbs(self, queries: int) -> bool:
        if not is_its_weight(self.kv_b_proj):
            return False
        mixing = queries * self.num_heads
        expanded = self.kv_lora_rank * super().expanded_size + mixing * (self.qk_head_dim + self.v_head_dim)
        return mixing * (2 * self.kv_lora_rank + self.made_rope) < expanded

    def score(self, q_latent: torch.Tensor, q_rows: torch.Tensor, latent: Any, k_rot: Any) -> torch.Tensor:
        # Queries and the key's up-projection meet the latents together: a packed cache is unpacked once.
        up = self.kv_b_proj.weight[super().expanded_size :].expand(len(q_latent), -1, -1)
        rows = torch.cat((q_latent, up), dim=1)
        found = rows @ latent[:, 0].mT if is_whole(latent) else latent.dot(rows)
        scores, key = found.split([q_latent.shape[1], self.made_rope], dim=1)
        return torch.baddbmm(scores, q_rows, self.finish_key(key.mT).mT)

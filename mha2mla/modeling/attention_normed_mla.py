"""Latent attention of families that norm queries and keys before they rotate (Qwen3, Gemma 3, OLMo 2, OLMoE).

The norm of a key needs the whole key, which a new token's input still gives: `k_proj` is the original's. What rotates
is taken from the normed key; what does not comes out of the latent and is multiplied by the key's scale, the inverse of
its root mean square, which is cached behind the rotated key: [B, 1, T, R + n] with n scales (one a key/value head, or
one for all). Other shapes as in attention_mla.py.
"""

from typing import Any

import torch
from torch import nn

from .attention_mla import MLAAttention, is_whole, rotate


class HeadNorm(nn.Module):
    """Root-mean-square norm of [B, S, heads, D] over every head, or over all of them (`joint`)."""

    def __init__(self, heads: int, size: int, joint: bool, eps: float) -> None:
        super().__init__()
        self.joint, self.eps = joint, eps
        self.weight = nn.Parameter(torch.ones(heads * size))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed x, and what it was multiplied by beside the weight: [B, S, heads], or [B, S, 1] if joint."""
        wide = x.float()
        mean = wide.square().mean((-2, -1) if self.joint else -1, keepdim=True)
        scale = torch.rsqrt(mean + self.eps)
        normed = wide * scale * self.weight.float().view(x.shape[-2:])
        return normed.to(x.dtype), scale.squeeze(-1)


class NormedMLAAttention(MLAAttention):
    """`MLAAttention` with norms on queries and keys. All heads share one rotated key (N = 1) and K = D."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        groups, size, joint = self.num_key_value_heads, config.head_dim, config.qk_norm_joint
        self.rotary_size = config.rotary_dim or size
        self.k_proj = nn.Linear(config.hidden_size, groups * size, bias=False)
        self.q_norm = HeadNorm(self.num_heads, size, joint, config.qk_norm_eps)
        self.k_norm = HeadNorm(groups, size, joint, config.qk_norm_eps)
        self.key_size: torch.Tensor
        self.rope_mixing: torch.Tensor
        # Usual root mean square of the keys, and every pair's share of the key/value heads; saved with the weights.
        self.register_buffer("key_size", torch.ones(self.key_scales))
        self.register_buffer("rope_mixing", torch.zeros(self.qk_rope_head_dim // 2, groups))

    @property
    def query_size(self) -> int:
        return int(self.config.head_dim)

    @property
    def projected_rope(self) -> int:
        return 0

    def project_queries(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, _ = self.q_norm(self.query_rows(hidden_states))
        mixing = self.rope_mixing.T.repeat_interleave(self.num_key_value_groups, 0)  # [H, P / 2]
        q_rot = rotate((self.pairs(query) * mixing[:, None]).flatten(-2), cos, sin)
        return query.transpose(1, 2), q_rot.transpose(1, 2)

    def project_latents(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, scale = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, -1)))
        mixed = torch.einsum("bsgcp,pg->bscp", self.pairs(key), self.rope_mixing.to(key.dtype))
        k_rot = rotate(mixed.flatten(-2)[:, :, None], cos, sin)[:, :, 0]
        latent = self.kv_a_proj_with_mqa(hidden_states)
        scale = (scale * self.key_size.float()).to(key.dtype)
        return latent.unsqueeze(1), torch.cat((k_rot, scale), dim=-1).unsqueeze(1)

    def pairs(self, rows: torch.Tensor) -> torch.Tensor:
        """The kept pairs of normed queries or keys [B, S, heads, D]: [B, S, heads, 2, P / 2]."""
        return rows[..., : self.rotary_size].unflatten(-1, (2, -1))[..., self.rope_pair_index[0]]

    def expand_kv(self, latent: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k_rot, scale = k_rot.split([self.rope_dim, self.key_scales], dim=-1)
        keys, values = super().expand_kv(latent, k_rot)
        k_nope, k_rot = keys.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return torch.cat((k_nope * scale[:, 0].mT[..., None], k_rot), dim=-1), values

    def score(self, q_latent: torch.Tensor, q_rows: torch.Tensor, latent: Any, k_rot: Any) -> torch.Tensor:
        batch, rows, _ = q_latent.shape
        if is_whole(latent):
            scores, scale = q_latent @ latent[:, 0].mT, k_rot[:, 0, :, self.rope_dim :].mT
            rotated = q_rows @ k_rot[:, 0, :, : self.rope_dim].mT
        else:
            numbers = torch.eye(self.rope_dim + self.key_scales, dtype=q_rows.dtype, device=q_rows.device)
            scores, scale = latent.dot(q_latent), k_rot.dot(numbers[self.rope_dim :].expand(batch, -1, -1))
            rotated = k_rot.dot(nn.functional.pad(q_rows, (0, self.key_scales)))
        scaled = scores.view(batch, self.key_scales, rows // self.key_scales, -1) * scale[:, :, None]
        return scaled.view(batch, rows, -1) + rotated

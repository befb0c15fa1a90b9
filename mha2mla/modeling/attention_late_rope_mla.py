"""Latent attention whose cache holds un-rotated latents alone: keys rotate when they are made from them.

A cached latent has no position. None is needed: scores depend on distances alone, and the tokens of a row lie side by
side in the cache, whatever is padded to their left. Everything rotates by its slot, from the layer's own frequencies.
Un-rotated keys are of fewer dimensions than rotated ones and lie about a mean, so few bits hold them better (KVTC,
arXiv 2511.01815). Shapes as in attention_mla.py; no rotated key is cached.
"""

from typing import Any

import torch

from .attention_mla import MLAAttention, rotate


class LateRopeMLAAttention(MLAAttention):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.rope_frequencies: torch.Tensor
        # Float32 numbers, in radians a token, by their bits: a model in half precision must not round them.
        self.register_buffer("rope_frequencies", torch.zeros(self.num_frequencies, dtype=torch.int32))

    @property
    def num_frequencies(self) -> int:
        raise NotImplementedError

    def project_latents(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        latent = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        return latent, latent[..., :0]

    def rotate_queries(self, query: torch.Tensor, slots: int, past_key_values: Any) -> torch.Tensor:
        """Queries [B, H, S, n] of the latest of so many slots, rotated."""
        length = query.shape[2]
        filled = torch.tensor(slots, device=query.device)
        if past_key_values is not None:
            # Static caches hand out slots that are still empty; those of a window have seen more tokens than they hold.
            seen = torch.as_tensor(past_key_values.get_seq_length(self.layer_idx), device=query.device)
            filled = torch.minimum(filled, seen)
        own = filled - length + torch.arange(length, device=query.device)
        return self.rotate_slots(query.transpose(1, 2), own).transpose(1, 2)

    def rotate_slots(self, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Queries or keys [B, S, heads, n] rotated by their slots [S]; angles and rotation in float32."""
        frequencies = self.rope_frequencies.view(torch.float32)
        angles = (slots.float()[:, None] * frequencies)[:, None]
        turning = 2 * len(frequencies)
        turned = rotate(rows[..., :turning], angles.cos(), angles.sin())
        return torch.cat((turned, rows[..., turning:]), dim=-1)

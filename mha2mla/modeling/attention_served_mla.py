"""Latent attention as serving engines look for it: vLLM's Transformers backend turns a module of this form into its
own MLA layer, whose cache holds r + R numbers a token (its matcher wants a root-mean-square norm on the latent, one
call of a method that expands it, and one call of the attention interface, all in `forward`).

Every head has rows of its own in the up-projection, and the norm on the latent is the identity: latents come out of
their projection so small that the norm's epsilon is all that counts. Same function as MLAAttention, without its
absorbed decoding, which the engine has. Shapes as in attention_mla.py, with one rotated key and G = H.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from .attention_mla import MLAAttention, rotate

SHRINK = 2.0**-20  # of latents; the norm's weight is its inverse


class ServedMLAAttention(MLAAttention):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.num_key_value_heads, self.num_key_value_groups = self.num_heads, 1
        self.kv_a_layernorm = LlamaRMSNorm(self.kv_lora_rank, eps=1.0)
        up_size = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, up_size, bias=False)

    def forward(  # type: ignore[override]  # exactly what engines call it with
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch, length, -1, self.qk_head_dim).transpose(1, 2)
        q_nope, q_rot = torch.split(query, [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        latent, k_rot = torch.split(compressed, [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent).view(batch, 1, length, self.kv_lora_rank)
        k_rot = k_rot.view(batch, 1, length, self.qk_rope_head_dim)
        cos, sin = self.layer_rotation(position_embeddings[0], position_embeddings[1])
        cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
        q_rot, k_rot = rotate(q_rot, cos, sin), rotate(k_rot, cos, sin)
        if past_key_values is not None:
            latent, k_rot = past_key_values.update(latent, k_rot, self.layer_idx)
        keys, values = self.expand_kv(latent, k_rot)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
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
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def expand_kv(self, latent: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, _, length, _ = latent.shape
        kv = self.kv_b_proj(latent).view(batch, length, self.num_heads, -1).transpose(1, 2)
        k_nope, values = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat((k_nope, k_rot.expand(-1, self.num_heads, -1, -1)), dim=-1), values

"""What a converted model's configuration has beside its family's own: the sizes of the latent attention.

Sizes carry DeepSeek's names (DeepSeek-V2, arXiv 2405.04434, section 2.1). `head_dim` stays the original head
size D, because the frequencies of the rotary embedding are the original model's.
"""

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(kw_only=True, repr=False)
class MLAConfigMixin:
    """The fields every converted family shares.

    kv_lora_rank: r, size of the cached latent.
    layer_kv_lora_rank: its size in every layer where they differ; kv_lora_rank is then their mean.
    q_lora_rank: rank of the factored query projection; None keeps it whole.
    num_rope_heads: 1 if all heads share one rotated key (DeepSeek), else one per key/value head (MHA2MLA).
    qk_rope_head_dim: rotated numbers of one head; the cache holds R = num_rope_heads * qk_rope_head_dim of them.
    qk_nope_head_dim: numbers of a head's key that lost their rotation and come out of the latent.
    v_head_dim: size of a head's value.
    softmax_scale: the original model's factor on the scores, whatever the new head sizes.
    q_proj_bias, kv_a_proj_bias, o_proj_bias: which projections have a bias.
    key_scales: of families with norms on queries and keys, scales the cache holds a token a layer beside r + R numbers:
        1 if one norm goes over all heads, else one a key/value head; 0 without norms.
    qk_norm: whether queries and keys pass such norms.
    qk_norm_joint, qk_norm_eps: whether those norms go over all heads together, and their epsilon.
    rope_full: keys come out of the latent un-rotated and rotate then (attention_full_rope_mla.py); qk_rope_head_dim and
        key_scales are 0.
    latent_rope_dim: numbers of one rotated key for all heads that the latent gives and that rotate then
        (attention_latent_rope_mla.py); qk_rope_head_dim is 0. 0: the cache holds what rotates.
    rotary_dim: numbers of an original head that rotate; 0: all.
    served: the attention in the form that serving engines recognise (attention_served_mla.py).
    latent_layers: which layers have latent attention; None: all.
    cache_format: bits of every cached channel (cache_format_mla.py); None: 16 each, as the model runs.
    """

    kv_lora_rank: int = 512
    layer_kv_lora_rank: list[int] | None = None
    q_lora_rank: int | None = None
    num_rope_heads: int = 1
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    softmax_scale: float = 192**-0.5
    q_proj_bias: bool = False
    kv_a_proj_bias: bool = False
    o_proj_bias: bool = False
    key_scales: int = 0
    qk_norm: bool = False
    qk_norm_joint: bool = False
    qk_norm_eps: float = 1e-6
    rotary_dim: int = 0
    rope_full: bool = False
    latent_rope_dim: int = 0
    served: bool = False
    latent_layers: list[int] | None = None
    cache_format: dict[str, Any] | None = None

    base_model_tp_plan: ClassVar[Any] = None  # the family's plan splits projections that are no longer there

    @property
    def qk_head_dim(self) -> int:
        """Size of one query head. transformers knows MLA models by this attribute."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim + self.latent_rope_dim

    @property
    def rope_dim(self) -> int:
        """R: rotated numbers in the cache, a token a layer."""
        return self.num_rope_heads * self.qk_rope_head_dim

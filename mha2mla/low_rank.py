"""Rank-r factors of the stacked weights [W_K (pairs that lost their rotation); W_V] (MHA2MLA, section 3.2).

A strategy takes (W_K [k, d], W_V [v, d], r) and returns (down [r, d], up [k + v, r]) with up @ down ≈ [W_K; W_V].
Selected with `ConversionOptions.low_rank`.
"""

from collections.abc import Callable

import torch

Factors = tuple[torch.Tensor, torch.Tensor]
LowRank = Callable[[torch.Tensor, torch.Tensor, int], Factors]


def truncated_svd(weight: torch.Tensor, rank: int) -> Factors:
    """Best rank-r factors (down [r, d], up [n, r]) in the Frobenius norm; all singular values stand in `up`."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return vh[:rank].to(weight.dtype), (u[:, :rank] * s[:rank]).to(weight.dtype)


def joint(w_key: torch.Tensor, w_value: torch.Tensor, rank: int) -> Factors:
    """One SVD of keys and values together (SVD_joint)."""
    return truncated_svd(torch.cat((w_key, w_value)), rank)


def split(w_key: torch.Tensor, w_value: torch.Tensor, rank: int) -> Factors:
    """Keys and values apart, half of the latent each; what one side's full rank leaves over goes to the other."""
    key_full, value_full = min(w_key.shape), min(w_value.shape)
    key_rank = max(min(rank // 2, key_full), rank - value_full)
    key_down, key_up = truncated_svd(w_key, key_rank)
    value_down, value_up = truncated_svd(w_value, rank - key_rank)
    return torch.cat((key_down, value_down)), torch.block_diag(key_up, value_up)


STRATEGIES: dict[str, LowRank] = {"joint": joint, "split": split}

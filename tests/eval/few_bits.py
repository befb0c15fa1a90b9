"""A stand-in for a quantised cache of models as they are: real packed bytes, keys by channel over each addition."""

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from eval.generate import NewCache


def quantized(states: torch.Tensor, bits: int, over: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed codes [.., D * bits / 8], minimum and scale of states [B, G, S, D], with ranges over dimension `over`."""
    low = states.amin(over, keepdim=True)
    scale = ((states.amax(over, keepdim=True) - low) / (2**bits - 1)).clamp_min(1e-6)
    codes = ((states - low) / scale).round().to(torch.uint8)
    parts = codes.unflatten(-1, (-1, 8 // bits))
    packed = sum(parts[..., place] << (bits * place) for place in range(8 // bits))
    return packed, low.half(), scale.half()


def restored(packed: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, bits: int, like: torch.Tensor) -> Any:
    places = torch.arange(8 // bits, dtype=torch.uint8) * bits
    codes = (packed[..., None] >> places) & (2**bits - 1)
    return (codes.flatten(-2) * scale.float() + low.float()).to(like.dtype)


class FewBitsLayer(DynamicLayer):
    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.kept, self.length = bits, [], 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.is_initialized = True
        self.length += key_states.shape[2]
        self.kept.append([quantized(states, self.bits, over) for states, over in ((key_states, 2), (value_states, 3))])
        pairs = [[restored(*part, self.bits, key_states) for part in parts] for parts in self.kept]
        return tuple(torch.cat(states, 2) for states in zip(*pairs, strict=True))

    def get_seq_length(self) -> int:
        return self.length


class FewBitsCache(Cache):
    def __init__(self, config: Any, bits: int) -> None:
        super().__init__(layers=[FewBitsLayer(bits) for _ in range(config.num_hidden_layers)])


def few_bits(bits: int) -> NewCache:
    return lambda model: FewBitsCache(model.config, bits)

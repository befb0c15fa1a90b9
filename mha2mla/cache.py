"""Bytes that a KV cache really holds: measured from its tensors, not computed from its configuration."""

from collections.abc import Iterator
from typing import Any

import torch


def cache_bytes(cache: Any) -> int:
    """Bytes of memory behind a transformers `Cache`, quantisation scales and zero points included.

    Storages are counted whole and once: a view of a larger tensor counts as the tensor it keeps alive,
    and a static cache counts what it has allocated. Counters (tensors of one element) are left out.
    """
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for tensor in _tensors(vars(layer)):
            if tensor.numel() > 1:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every plain tensor inside nested containers and wrapper tensors (quantised ones hold several)."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            for name in names:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif type(value).__module__.startswith("mha2mla."):  # the parts that our own cache layers are made of
        yield from _tensors(vars(value))

"""Bytes that a KV cache really holds: measured from its tensors, not computed from its configuration."""

from collections.abc import Iterator
from typing import Any

import torch

OURS = ("mha2mla.", "transformers_modules.")  # the latter where a checkpoint brings its code


def cache_bytes(cache: Any, number_bytes: int | None = None) -> int:
    """Bytes of memory behind a transformers `Cache`, quantisation scales and zero points included.

    number_bytes: count no floating-point number as more bytes than that. With 2 it is what the cache holds where models
    run in 16 bits, whatever this one runs in: so bytes measured on different machines compare.

    Storages are counted whole and once: a view of a larger tensor counts as the tensor it keeps alive,
    and a static cache counts what it has allocated. Counters (tensors of one element) are left out.
    """
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for tensor in _tensors(vars(layer)):
            if tensor.numel() > 1:
                storages[tensor.untyped_storage().data_ptr()] = storage_bytes(tensor, number_bytes)
    return sum(storages.values())


def storage_bytes(tensor: torch.Tensor, number_bytes: int | None = None) -> int:
    """Of the storage behind a tensor, its numbers counted as `cache_bytes` says; codes are whole numbers and stay."""
    held, size = tensor.untyped_storage().nbytes(), tensor.element_size()
    if number_bytes is None or not tensor.is_floating_point():
        return held
    return held // size * min(size, number_bytes)


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
    elif getattr(value, "of_model", False):
        return  # tables that a cache reads codes by are the model's, however many tokens it holds
    elif type(value).__module__.startswith(OURS):  # the parts that our own cache layers are made of
        yield from _tensors(vars(value))

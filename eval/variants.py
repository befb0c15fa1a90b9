"""What is scored: a model's name in the tables, how it is loaded, and the cache that it is measured through."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from conf.checkpoint import load_model
from eval.generate import NewCache, coded_cache
from eval.results import CODED


@dataclass(frozen=True)
class Variant:
    """One model with one cache.

    load: makes the model, ready on its device.
    new_cache: an empty cache for it, through which texts, tasks and benchmarks all go; None: its own, as `generate`
        makes it, and none for texts.
    path, revision: where its weights come from. bits: of its cache, where a name says them.
    is_original: its weights are the original's, so that it is its own reference without that cache.
    """

    name: str
    load: Callable[[], Any]
    path: str
    revision: str | None = None
    new_cache: NewCache | None = None
    bits: float | None = None
    is_original: bool = False


def checkpoint(
    name: str, path: str, dtype: torch.dtype, device: str, revision: str | None = None, is_original: bool = False
) -> Variant:
    """A model as it lies in a folder or on the hub."""
    load = lambda: load_model(path, dtype, revision=revision, device=device)  # noqa: E731
    return Variant(name, load, path, revision, is_original=is_original)


def in_few_bits(variant: Variant, cache_bits: Iterable[int]) -> list[Variant]:
    """A converted model with its latents in so many bits, once for each."""
    return [
        Variant(CODED.format(variant.name, bits), variant.load, variant.path, variant.revision, coded_cache(bits), bits)
        for bits in cache_bits
    ]

"""The original with a quantised cache: what the bytes of a converted model would have bought without converting.

    kivi-4, kivi-3, kivi-2       keys by channel over groups of tokens, values by token (KIVI, arXiv 2402.02750)
    transform-2, transform-1.5   keys and values in a basis of their own, so many bits a number on average: the
                                 conversion with rope=full at full rank (as KVTC, arXiv 2511.01815)

A name says how a model is loaded and which cache it is measured through (`Variant`).
"""

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from conf.evaluation import baseline_bits
from conf.precision import native_autocast
from conf.schema import Config
from data.calibration import calibration_batches
from eval.generate import NewCache
from eval.variants import Variant
from mha2mla import ConversionOptions, KiviCache, collect_statistics, convert


def baseline(name: str, original: Variant, config: Config, tokenizer: Any) -> Variant:
    """The original as the baseline of this name; ValueError for a name that is none."""
    method, bits = baseline_bits(name)
    if method == "kivi":
        return replace(original, name=name, new_cache=kivi_cache(int(bits)), bits=bits)

    def load() -> Any:
        return transform_coder(original.load(), tokenizer, bits, calibration_batches(config, tokenizer))

    return Variant(name, load, original.path, original.revision, bits=bits)


def check_baselines(names: Iterable[str], config: Any) -> None:
    """ValueError for a quantised cache that a model of this configuration cannot have."""
    for name in names:
        method, bits = baseline_bits(name)
        if method == "kivi":
            kivi_cache(int(bits))(SimpleNamespace(config=config))


def kivi_cache(bits: int) -> NewCache:
    """An empty `KiviCache` of so many bits for a model."""
    return lambda model: KiviCache(model.config, bits=bits)


def transform_coder(model: Any, tokenizer: Any, bits: float, batches: Iterable[torch.Tensor]) -> Any:
    """The original converted at full rank with `bits` a cached number on average, everything that a cache of the
    default context holds counted: it quantises its cache by itself.

    batches: calibration text, int64 input_ids [B, S] each.
    """
    batches = [batch.to(model.device) for batch in batches]
    options = ConversionOptions(rope="full", low_rank="attention", bits="auto", reduction=1 - bits / 16)
    with native_autocast(model.device.type):
        statistics = collect_statistics(model, batches)
    converted, _ = convert(model, options, statistics, batches=batches)
    return converted.eval()

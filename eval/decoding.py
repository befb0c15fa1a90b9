"""Decoding measured: a prompt, steps after it, the memory of both. What `eval.bench` lays a grid over.

Nothing here depends on what the weights are, so any tokens do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache

from conf.memory import held_bytes, peak_bytes, reset_peak
from conf.timing import seconds_of
from mha2mla import cache_bytes
from mha2mla.families import attention_layers, geometry_of
from mha2mla.memory import hand_back
from mha2mla.modeling.attention_mla import MLAAttention

NewCache = Callable[[int], Cache]  # an empty cache for so many tokens


@dataclass
class Variant:
    """A way to decode: a model, the caches it fills, and whether latents are expanded at every step."""

    name: str
    model: Any
    new_cache: NewCache
    expands: bool = False
    call: Any = None  # what runs a step; default: the model

    def __post_init__(self) -> None:
        self.call = self.call or self.model
        parameter = next(self.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.weight_bytes = sum(each.nbytes for each in self.model.parameters())


def own_cache(model: Any, static: bool) -> NewCache:
    """The cache that a model fills by itself: of a fixed size, or growing."""
    return lambda limit: (
        StaticCache(config=model.config, max_cache_len=limit) if static else DynamicCache(config=model.config)
    )


def compiled(variant: Variant) -> Variant:
    """The same with its steps compiled into CUDA graphs; needs a static cache."""
    call = torch.compile(variant.model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    return Variant(f"{variant.name}, compiled", variant.model, variant.new_cache, variant.expands, call)


class Decoding:
    """One variant with a cache of `batch` sequences of `context` tokens, and what making and using it took.

    `prefill`: fill the cache from a prompt, and time that; else with random states, whose shapes alone count.
    """

    def __init__(self, variant: Variant, batch: int, context: int, limit: int, prefill: bool) -> None:
        self.variant, self.batch = variant, batch
        self.seconds: list[float] = []
        self.first_token_seconds: float | None = None
        self.cache = variant.new_cache(limit)
        hand_back(variant.device)
        before, counts = held_bytes(variant.device), reset_peak(variant.device)
        if prefill:
            self.first_token_seconds = self.prompt(context)
        else:
            self.fill(context)
        self.cache_bytes = cache_bytes(self.cache)
        self.cache_bytes_16_bit = cache_bytes(self.cache, number_bytes=2)
        taken = max(peak_bytes(variant.device) - before, self.cache_bytes)
        self.prompt_memory = variant.weight_bytes + taken if counts and prefill else None
        self.step_memory: int | None = None

    @torch.inference_mode()
    def prompt(self, context: int) -> float:
        """Seconds from a prompt to its first token, after a short prompt that warms up."""
        short = torch.ones(self.batch, min(context, 64), dtype=torch.long, device=self.variant.device)
        self.variant.model(short, past_key_values=self.variant.new_cache(64), use_cache=True, logits_to_keep=1)
        vocabulary = self.variant.model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (self.batch, context), generator=torch.Generator().manual_seed(0))
        ids = ids.to(self.variant.device)
        return seconds_of(
            lambda: self.variant.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1),
            self.variant.device,
        )

    def fill(self, context: int) -> None:
        config, variant = self.variant.model.config, self.variant
        for layer, attention in enumerate(attention_layers(variant.model)):
            if isinstance(attention, MLAAttention):
                shapes = [(1, attention.kv_lora_rank), (1, attention.cached_size - attention.kv_lora_rank)]
            else:
                geometry = geometry_of(config)
                shapes = [(geometry.num_kv_heads, geometry.head_dim)] * 2
            first, second = (
                torch.randn(self.batch, heads, context, size, device=variant.device, dtype=variant.dtype)
                for heads, size in shapes
            )
            self.cache.update(first, second, layer)

    @torch.inference_mode()
    def steps(self, count: int, weigh: bool = False) -> float:
        """Seconds a step over `count` decoded tokens; `weigh` counts their memory, which takes time itself."""
        variant = self.variant
        device = variant.device
        if weigh:
            hand_back(device)
            counts, before = reset_peak(device), held_bytes(device)
        first = torch.ones(self.batch, 1, dtype=torch.long, device=device)

        def run() -> None:
            ids = first
            for _ in range(count):
                torch.compiler.cudagraph_mark_step_begin()
                ids = variant.call(ids, past_key_values=self.cache, use_cache=True).logits[:, -1:].argmax(-1)

        chosen_by_shape = MLAAttention.absorbs
        if variant.expands:
            MLAAttention.absorbs = lambda self, queries: False  # type: ignore[method-assign]
        try:
            took = seconds_of(run, device) / count
        finally:
            MLAAttention.absorbs = chosen_by_shape  # type: ignore[method-assign]
        if weigh and counts:
            self.step_memory = variant.weight_bytes + self.cache_bytes + max(0, peak_bytes(device) - before)
        return took


def largest_batch(variant: Variant, context: int, limit: int) -> int:
    """Sequences of `context` tokens that a step fits on the GPU, to a sixteenth."""

    def fits(batch: int) -> bool:
        try:
            Decoding(variant, batch, context, limit, prefill=False).steps(1)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            hand_back(variant.device)

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes; the best of five."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds_of(lambda: target.copy_(source), device) for _ in range(6))

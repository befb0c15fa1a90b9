"""Greedy generation, with the bytes of its cache measured after each batch.

Batches are padded on the left. The cache that is measured is the one the model fills, given to `generate` or made by
it, so what is measured is what decoding really held: the prompt, its padding and all generated tokens but the last.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from conf.steps import EveryStep
from data.stops import padded_left
from mha2mla import QuantizedLatentCache, cache_bytes
from mha2mla.finite import FiniteScores

ROPE_BITS = 8  # of the rotated key, where the latent is coded
NewCache = Callable[[Any], Cache | None]  # an empty cache for a model; None where the model makes its own


def growing_cache(model: Any) -> Cache | None:
    """Numbers as the model makes them; none for a model with a cache format, which makes its packed one unasked."""
    return None if getattr(model.config, "cache_format", None) else DynamicCache(config=model.config)


def coded_cache(bits: int) -> NewCache:
    """The latent in so many bits, with ranges of every token's own."""
    return lambda model: QuantizedLatentCache(model.config, bits, ROPE_BITS)


@dataclass
class CacheReading:
    """Bytes held, and the positions they were held for: batch × cached tokens, summed over batches."""

    bytes: int = 0
    positions: int = 0
    layers: int = 0
    largest: int = 0  # bytes of the largest batch
    bytes_16_bit: int = 0  # with its numbers in 16 bits, whatever the model runs in: what reductions are made of

    def add(self, cache: Any, batch: int) -> None:
        held, positions = cache_bytes(cache), batch * cache.get_seq_length()
        self.join(CacheReading(held, positions, len(cache.layers), held, cache_bytes(cache, number_bytes=2)))

    def join(self, other: "CacheReading") -> None:
        self.bytes += other.bytes
        self.bytes_16_bit += other.bytes_16_bit
        self.positions += other.positions
        self.layers = other.layers
        self.largest = max(self.largest, other.largest)

    @property
    def per_token_per_layer(self) -> float:
        return self.bytes / (self.positions * self.layers)


@dataclass
class Stops:
    """Token ids that end an output (all models compared use the original's), and the one that pads."""

    ends: list[int]
    pad: int
    newline: int


class FirstLine(StoppingCriteria):
    """Stops an output once its first non-empty line is complete: what follows counts for nothing."""

    def __init__(self, tokenizer: Any, prompt_length: int):
        self.tokenizer, self.prompt_length = tokenizer, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        done = ["\n" in text.lstrip("\n") for text in texts]
        return torch.tensor(done, device=input_ids.device)


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: whatever does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[torch.Tensor],  # 1-D ids each
    max_new_tokens: int,
    stops: Stops,
    reading: CacheReading,
    first_line: bool = False,
    newline_ends: bool = False,
    new_cache: NewCache = growing_cache,
    on_step: Callable[[int], None] | None = None,
) -> list[str]:
    """The outputs of one batch as text, without special tokens; adds the cache's bytes to `reading`.

    `on_step` is told the number of tokens generated, after each. Raises ValueError where logits are not finite.
    """
    input_ids, mask = padded_left(prompts, stops.pad)
    longest = input_ids.shape[1]
    ends = [*stops.ends, stops.newline] if newline_ends else stops.ends
    # Set on the model, or `generate` would fill what is not given from the checkpoint's own settings.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=1 if newline_ends else None,
        eos_token_id=ends or None,
        pad_token_id=stops.pad,
        return_dict_in_generate=True,
    )
    cache = new_cache(model)
    given = {} if cache is None else {"past_key_values": cache}  # what is given wins over a model's own
    criteria: list[StoppingCriteria] = [FirstLine(tokenizer, longest)] if first_line else []
    criteria += [EveryStep(on_step, longest)] if on_step else []
    with torch.inference_mode():
        output = model.generate(
            input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=[FiniteScores()],
            stopping_criteria=StoppingCriteriaList(criteria),
            **given,
        )
    reading.add(output.past_key_values if cache is None else cache, len(prompts))
    rows = output.sequences[:, longest:].tolist()
    return [tokenizer.decode(until(row, set(ends)), skip_special_tokens=True) for row in rows]


def until(ids: list[int], ends: set[int]) -> list[int]:
    """Ids before the first that ends the output."""
    return next((ids[:place] for place, token in enumerate(ids) if token in ends), ids)

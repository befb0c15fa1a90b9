"""Batched greedy generation against single prompts, its stop rules, and the bytes that its cache held."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from eval.generate import CacheReading, Stops, batches, generate, until
from mha2mla import ConversionOptions, cache_bytes, convert
from tests.eval.few_bits import few_bits
from tests.eval.tiny import model, tokenizer

STOPS = Stops(ends=[2], pad=0, newline=tokenizer()("\n", add_special_tokens=False)["input_ids"][-1])


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 600, (length,), generator=generator, dtype=torch.int32) for length in lengths]


def reference(tiny: torch.nn.Module, ids: torch.Tensor, count: int) -> str:
    """Greedy decoding without any cache."""
    ids = ids.long()[None]
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.cat([ids, tiny(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokenizer().decode(until(ids[0, start:].tolist(), {2}), skip_special_tokens=True)


@pytest.mark.parametrize("converted", [False, True])
def test_a_padded_batch_gives_what_each_prompt_gives_alone_without_a_cache(converted):
    tiny = model()
    if converted:
        tiny, _ = convert(tiny, ConversionOptions(rope_dim=8, kv_lora_rank=16))
    chosen = prompts(30, 9, 21)
    outputs = generate(tiny, tokenizer(), chosen, 8, STOPS, CacheReading())
    assert outputs == [reference(tiny, ids, 8) for ids in chosen]


def test_settings_of_the_checkpoint_do_not_leak_into_generation():
    tiny, chosen = model(), prompts(20)
    expected = generate(tiny, tokenizer(), chosen, 8, STOPS, CacheReading())
    tiny.generation_config = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=9.0, max_length=22)
    assert generate(tiny, tokenizer(), chosen, 8, STOPS, CacheReading()) == expected


def test_measured_bytes_are_those_of_the_cache_and_their_ratio_is_that_of_the_sizes():
    original = model()  # 2 layers, 2 KV heads of 8: 32 numbers a token a layer
    converted, _ = convert(original, ConversionOptions(rope_dim=4, kv_lora_rank=6))  # 10 numbers
    readings = []
    for tiny in (original, converted):
        reading = CacheReading()
        # No end token: 8 new tokens each, of which the last is not cached.
        for chosen in (prompts(30, 9), prompts(12)):
            generate(tiny, tokenizer(), chosen, 8, Stops([599 + 1], 0, 0), reading)
        readings.append(reading)
    positions = 2 * (30 + 7) + 1 * (12 + 7)
    for reading, numbers in zip(readings, (32, 10), strict=True):
        assert (reading.positions, reading.layers) == (positions, 2)
        assert reading.bytes == positions * 2 * numbers * 4  # float32
        assert reading.per_token_per_layer == numbers * 4
        assert reading.largest == 2 * 37 * 2 * numbers * 4


class Scripted(torch.nn.Module):
    """Stands behind a tiny model's output layer and makes it say given tokens, one list per row of the batch."""

    def __init__(self, script: list[list[int]]):
        super().__init__()
        self.script, self.step = script, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:2], 600)
        for row, tokens in enumerate(self.script):
            logits[row, -1, tokens[min(self.step, len(tokens) - 1)]] = 9.0
        self.step += 1
        return logits


def say(*texts: str, steps: int = 12, **rules: bool) -> tuple[list[str], int]:
    """Outputs, and the number of steps, of a model that says `texts`."""
    tiny = model()
    tiny.lm_head = Scripted([tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts])
    outputs = generate(tiny, tokenizer(), prompts(*[9] * len(texts)), steps, STOPS, CacheReading(), **rules)
    return outputs, tiny.lm_head.step


def test_stop_rules():
    # An end token ends its own row; the padding that follows is no part of it.
    outputs, steps = say("x</s>y", "zz</s>")
    assert outputs == ["x", "zz"] and steps < 12
    # First line: blank lines before it do not count; it stops as soon as every row has its line.
    outputs, steps = say("\n\na b\nc d", "e\nf", first_line=True)
    assert [text.lstrip("\n").split("\n")[0] for text in outputs] == ["a b", "e"] and steps < 9
    # Without the rule the same model goes on.
    assert say("\n\na b\nc d", "e\nf")[1] == 12
    # A newline as an end token, but not as the first token.
    outputs, _ = say("a\nb", newline_ends=True)
    assert outputs == ["a"]
    outputs, steps = say("\n\n", newline_ends=True)
    assert steps > 1


def test_batches_go_from_long_to_short_and_lose_nothing():
    assert list(batches([3, 9, 9, 1, 5], 2)) == [[1, 2], [4, 0], [3]]
    assert until([5, 6, 2, 7, 2], {2}) == [5, 6] and until([5], {2}) == [5]


def test_nothing_is_generated_from_logits_that_are_not_finite():
    tiny = model()
    tiny.lm_head.weight.data[7, 3] = float("nan")  # the score of one token: greedily it would be said for ever
    with pytest.raises(ValueError, match="logits are not finite after 20 tokens"):
        generate(tiny, tokenizer(), prompts(20), 4, STOPS, CacheReading())


@pytest.mark.parametrize("form", [None, {"scales": "table"}])
def test_a_model_with_a_cache_format_is_given_no_cache_and_its_own_is_measured(
    form: dict | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, given, made = model(), [], []
    tiny.config.cache_format = form

    def preparing(config: Any, kwargs: dict[str, Any], *args: Any, **rest: Any) -> None:
        """In place of a packed cache: one of two bits, if none is given."""
        given.append(kwargs.get("past_key_values"))
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = few_bits(2)(tiny)
        made.append(kwargs["past_key_values"])

    monkeypatch.setattr(tiny, "_prepare_cache_for_generation", preparing)
    reading = CacheReading()
    generate(tiny, tokenizer(), prompts(30), 8, Stops([600], 0, 0), reading)
    assert (given[0] is None) == (form is not None)
    assert reading.positions == 37 and reading.bytes == cache_bytes(made[0])
    # A control: the numbers of a model without a format take many times the bytes.
    assert (reading.bytes < 37 * 2 * 32 * 4 / 3) == (form is not None)
    own = CacheReading()  # what a caller gives wins
    generate(tiny, tokenizer(), prompts(30), 8, Stops([600], 0, 0), own, new_cache=few_bits(4))
    assert given[1] is not None and reading.bytes != own.bytes

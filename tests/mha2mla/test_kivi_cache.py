"""KiviCache against a cache that holds everything and rounds complete groups on reading; what it holds; its bytes."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from mha2mla import ConversionOptions, KiviCache, cache_bytes, convert
from mha2mla.kivi_cache import bytes_per_token
from tests.mha2mla.test_kivi_groups import outliers
from tests.tiny import FAMILIES, KV_HEADS, VARIANTS, relative, tiny_model, tokens

GROUP, SINKS = 8, 4
SETTINGS: dict[str, Any] = {"group_size": GROUP, "sink_length": SINKS}
WINDOWED = ["mistral", "gemma2", "gemma3_text"]


def small(family: str = "llama", heads: str = "gqa") -> Any:
    changes = {"sliding_window": 12} if family in WINDOWED else {}
    return tiny_model(family, KV_HEADS[heads], **changes)


def round_groups(states: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Complete groups [..., N, g, D] rounded between the extremes along an axis, in plain arithmetic."""
    dtype, states = states.dtype, states.float()
    minimum = states.amin(axis, keepdim=True).half().float()
    scale = ((states.amax(axis, keepdim=True) - minimum) / (2**bits - 1)).half().float()
    return (minimum + scale * ((states - minimum) / scale).round().clamp(0, 2**bits - 1)).to(dtype)


class Rounding(DynamicCache):
    """Keeps all tokens unquantised, windows or not; complete groups are rounded whenever it is read."""

    def __init__(self, bits: int, sinks: int = SINKS, keys_per_token: bool = False) -> None:
        super().__init__()
        self.bits, self.sinks, self.axes = bits, sinks, (-1 if keys_per_token else -2, -1)

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        both = super().update(key_states, value_states, layer_idx)
        return tuple(self.rounded(states, axis) for states, axis in zip(both, self.axes, strict=True))

    def rounded(self, states: torch.Tensor, axis: int) -> torch.Tensor:
        end = self.sinks + max(0, states.shape[2] - self.sinks) // GROUP * GROUP
        if end == self.sinks:
            return states
        groups = states[:, :, self.sinks : end].unflatten(2, (-1, GROUP))
        if (
            axis == -1
        ):  # a token's channels in shares of 8, as head_dim 8 has one of, or of its largest divisor: 12 of 6
            share = next(size for size in range(GROUP, 0, -1) if states.shape[3] % size == 0)
            rounded = round_groups(groups.unflatten(-1, (-1, share)), self.bits, -1).flatten(-2)
        else:
            rounded = round_groups(groups, self.bits, -2)
        return torch.cat((states[:, :, : self.sinks], rounded.flatten(2, 3), states[:, :, end:]), 2)


@torch.no_grad()
def through(model: Any, cache: Any, ids: torch.Tensor, prompt: int = 22) -> torch.Tensor:
    """Logits of a prompt in two chunks, then of one token at a time."""
    parts = [model(part, past_key_values=cache).logits for part in ids[:, :prompt].split(15, 1)]
    parts += [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(prompt, ids.shape[1])]
    return torch.cat(parts, 1)


@torch.no_grad()
def window(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    return model(ids, past_key_values=cache, use_cache=True).logits


def held(cache: Any) -> list[torch.Tensor]:
    """Keys and values of every layer as attention gets them."""
    return [layer.read(slot) for layer in cache.layers for slot in (0, 1)]


def same(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


@pytest.mark.parametrize(("family", "heads"), VARIANTS)
def test_every_family_reads_what_rounding_gives(family: str, heads: str) -> None:
    """Window, chunks and single tokens; control: the same cache with groups that begin one token later."""
    model, ids = small(family, heads), tokens(2, 40)
    for run in (window, lambda model, ids, cache: through(model, cache, ids)):
        got = run(model, ids, KiviCache(model.config, 4, **SETTINGS))
        assert relative(got, run(model, ids, Rounding(4))) < 1e-4
        assert relative(got, run(model, ids, Rounding(4, sinks=SINKS + 1))) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "gpt_neox"])
def test_bfloat16_reads_what_rounding_gives(family: str) -> None:
    model, ids = small(family).bfloat16(), tokens(2, 40)
    got = through(model, KiviCache(model.config, 2, **SETTINGS), ids)
    error = relative(got, through(model, Rounding(2), ids))
    assert got.dtype == torch.bfloat16 and error < 0.02
    assert relative(got, through(model, Rounding(2, sinks=SINKS + 1), ids)) > 5 * error


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_the_window_where_groups_agree(family: str) -> None:
    """Behind a prompt, tokens that complete no group: one by one or at once. With one more, a group is complete."""
    model, ids = small(family), tokens(2, SINKS + 3 * GROUP)

    def behind(end: int, step: int) -> torch.Tensor:
        cache = KiviCache(model.config, 2, **SETTINGS)
        window(model, ids[:, : SINKS + 2 * GROUP], cache)
        return torch.cat([window(model, part, cache) for part in ids[:, SINKS + 2 * GROUP : end].split(step, 1)], 1)

    almost = SINKS + 3 * GROUP - 1
    assert relative(behind(almost, 1), behind(almost, GROUP)) < 1e-5
    assert relative(behind(almost + 1, 1), behind(almost + 1, GROUP)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt_neox"])
def test_fewer_bits_lose_more(family: str) -> None:
    model, ids = small(family), tokens(2, 40)
    exact = window(model, ids, DynamicCache())
    errors = [relative(window(model, ids, KiviCache(model.config, bits, **SETTINGS)), exact) for bits in (4, 3, 2)]
    assert all(fewer > 1.3 * more for more, fewer in pairwise(errors))
    incomplete = window(model, ids[:, : SINKS + GROUP - 1], KiviCache(model.config, 2, **SETTINGS))
    assert relative(incomplete, window(model, ids[:, : SINKS + GROUP - 1], DynamicCache())) < 1e-5


def test_a_cache_keeps_keys_by_channel_and_values_by_token() -> None:
    """Its keys do not mind outlier channels and its values do."""
    keys = torch.randn(1, 2, 36, 32, generator=torch.Generator().manual_seed(0))
    errors = []
    for states in ((outliers(keys), keys), (keys, outliers(keys))):
        cache = KiviCache(tiny_model().config, 4)
        errors.append([float((a - b).norm()) for a, b in zip(cache.update(*states, 0), states, strict=True)])
    assert errors[0][0] < 1.1 * errors[1][0] and 3 * errors[0][1] < errors[1][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [None, 5, 20])
def test_first_and_latest_tokens_stay_as_they_are(residual: int | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 2, 45, 8, generator=generator).to(dtype) for _ in (0, 1)]
    cache = KiviCache(tiny_model().config, 2, residual_length=residual, **SETTINGS)
    cache.update(*(own[:, :, :30] for own in states), 0)
    got = cache.update(*(own[:, :, 30:] for own in states), 0)
    packed = (45 - SINKS - (residual or 0)) // GROUP * GROUP
    kept = torch.ones(45, dtype=torch.bool)
    kept[SINKS : SINKS + packed] = False
    for back, own in zip(got, states, strict=True):
        assert back.dtype == dtype and back.shape == own.shape
        assert torch.equal(back[:, :, kept], own[:, :, kept])
        assert not torch.isclose(back[:, :, ~kept], own[:, :, ~kept]).all(3).any()


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_neox"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_gives_what_rounding_on_reading_gives(family: str, options: dict[str, int]) -> None:
    """Of a batch with padding on the left, over the edges of groups and windows."""
    model, ids = small(family), tokens(3, 14)
    mask = torch.ones_like(ids)
    mask[0, :6], ids[0, :6] = 0, 0
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None} | options
    caches = KiviCache(model.config, 4, **SETTINGS), Rounding(4)
    ours, expected = (model.generate(ids, attention_mask=mask, past_key_values=cache, **settings) for cache in caches)
    assert torch.equal(ours, expected) and caches[0].get_seq_length() == 33


def test_padding_on_the_left_is_not_attended_to() -> None:
    """Of a row that is padded by complete groups nothing differs, but the first tokens: they are none here."""
    model, ids = small(), tokens(1, 24)
    with torch.no_grad():
        alone = model(ids, past_key_values=KiviCache(model.config, 4, GROUP, sink_length=0)).logits
        padded = torch.cat((torch.zeros(1, 2 * GROUP, dtype=torch.long), ids), 1)
        mask = (torch.arange(padded.shape[1]) >= 2 * GROUP).long()[None]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        cache = KiviCache(model.config, 4, GROUP, sink_length=0)
        got = model(padded, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    assert relative(got[:, 2 * GROUP :], alone) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_assisted_generation_gives_what_rounding_on_reading_gives(family: str) -> None:
    """Candidates that are rejected are cropped, out of groups that were complete with them."""
    model = small(family)
    ids = tokens(1, 5).repeat(1, 4)  # a text that repeats has candidates
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    caches = KiviCache(model.config, 4, **SETTINGS), Rounding(4)
    ours, expected = (
        model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=6, **settings) for cache in caches
    )
    assert torch.equal(ours, expected)
    assistant = small(family)
    cache = KiviCache(model.config, 4, **SETTINGS)
    with_model = model.generate(ids, past_key_values=cache, assistant_model=assistant, **settings)
    assert with_model.shape == ours.shape


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("removed", [0, 1, 5, 9, 14])
def test_a_crop_of_a_recorded_past_leaves_no_trace(family: str, removed: int) -> None:
    """Nor memory. Control: one that was not announced leaves tokens of packed groups rounded."""
    states = torch.randn(2, 2, 46, 8, generator=torch.Generator().manual_seed(0))
    config = tiny_model(family, **({"sliding_window": 30} if family in WINDOWED else {})).config

    def filled(end: int, record: bool) -> KiviCache:
        cache = KiviCache(config, 3, **SETTINGS)
        for part in (states[:, :, :30], states[:, :, 30:end]):
            for layer in (0, 1):
                cache.update(part, part, layer)
            if record:
                cache.activate_past_recording()
        return cache

    expected = filled(46 - removed, record=False)
    cache, sudden = filled(46, record=True), filled(46, record=False)
    cache.crop(-removed)
    assert cache.get_seq_length() == expected.get_seq_length() == 46 - removed
    assert same(held(cache), held(expected)) and cache_bytes(cache) == cache_bytes(expected)
    if removed > 2 and family == "llama":  # into the group that ends at 44
        sudden.crop(-removed)
        assert not same(held(sudden), held(expected))


@pytest.mark.parametrize("removed", [1, 3, 7, 12, 28, 33, 40])
def test_a_crop_leaves_what_was_read_before(removed: int) -> None:
    """Into packed groups, to their edges, into the first tokens, to nothing; then the cache grows again."""
    model, ids = small(), tokens(2, 36)
    cache = KiviCache(model.config, 4, **SETTINGS)
    through(model, cache, ids)
    before, left = held(cache), max(0, 36 - removed)
    cache.crop(-removed)
    assert cache.get_seq_length() == left
    assert same(held(cache), [states[:, :, :left] for states in before])
    through(model, cache, tokens(2, 30, seed=3))
    assert cache.get_seq_length() == left + 30
    packed = max(0, left + 30 - SINKS) // GROUP
    assert all(groups.length == packed for layer in cache.layers for groups in layer.groups)
    first = min(left, SINKS)
    assert same([states[:, :, :first] for states in held(cache)], [states[:, :, :first] for states in before])
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


def test_a_crop_into_what_a_window_has_forgotten_is_refused() -> None:
    model = small("mistral")
    cache = KiviCache(model.config, 4, **SETTINGS)
    through(model, cache, tokens(2, 36))
    with pytest.raises(ValueError, match="a sliding window of 12 has forgotten .* call activate_past_recording"):
        cache.crop(-16)


def test_beams_and_repeated_batches_take_their_rows_along() -> None:
    model = small()
    cache = KiviCache(model.config, 4, **SETTINGS)
    through(model, cache, tokens(3, 39))
    before = held(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert same(held(cache), [states[[2, 0]] for states in before])
    through(model, cache, tokens(2, 90))
    assert cache.get_seq_length() == 129
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0
    assert relative(through(model, cache, tokens(3, 39)), through(model, Rounding(4), tokens(3, 39))) < 1e-4


CONTEXTS = [1, 4, 36, 100, 4096]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_neox"])
def test_bytes_are_those_of_the_closed_form(family: str, context: int) -> None:
    model = tiny_model(family, **({"sliding_window": 300} if family in WINDOWED else {}))
    config, heads = model.config, 4 if family == "gpt_neox" else 2
    head_dim = 12 if family == "gemma2" else 8
    for bits, sizes in ((4, {}), (3, {"group_size": 64, "sink_length": 0}), (2, {"residual_length": 128})):
        cache = KiviCache(config, bits, **sizes)
        for start in range(0, context, 1000):  # in chunks, as a long prompt may come, then a token at a time
            states = torch.randn(1, heads, min(1000, context - start), head_dim)
            for layer in range(2):
                for some in (states[:, :, :-40], *states[:, :, -40:].split(1, 2)):
                    cache.update(some, some, layer)
        assert cache.get_seq_length() == context
        assert cache_bytes(cache, number_bytes=2) == pytest.approx(
            bytes_per_token(config, bits, context, **sizes) * context
        )


def test_bytes_of_4096_tokens_are_what_the_bits_promise() -> None:
    """By hand: 127 groups, codes and two halves for every 32 numbers, 32 tokens in 16 bits."""
    config = tiny_model(hidden_size=128).config  # 2 key/value heads of 32
    for bits, cut in ((4, 0.68), (3, 0.74), (2, 0.805)):
        group = 2 * (32 * 32 * bits // 8) + 2 * 2 * 32 * 2
        whole = 2 * 2 * (127 * group + 32 * 2 * 32 * 2)
        got = bytes_per_token(config, bits, 4096)
        assert got * 4096 == whole
        assert 1 - got / (2 * 2 * 2 * 32 * 2) == pytest.approx(cut, abs=0.005)


def test_a_window_forgets_groups_and_their_bytes() -> None:
    model = tiny_model("mistral", sliding_window=40)
    cache = KiviCache(model.config, 4, **SETTINGS)
    sizes = []
    for part in tokens(1, 240).split(80, 1):
        window(model, part, cache)
        sizes.append(cache_bytes(cache))
        assert 39 <= held(cache)[0].shape[2] < 39 + 2 * GROUP
    assert max(sizes) - min(sizes) < 0.2 * min(sizes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "bits=8 is not possible in a KIVI cache; choose one of 2, 3, 4"),
        ({"bits": 4.0}, "bits=4.0 is not possible"),
        ({"bits": True}, "bits=True is not possible"),
        ({"group_size": 0}, "group_size=0 is not a number of tokens; give a whole number from 1 on"),
        ({"residual_length": -1}, "residual_length=-1 is not a number of tokens"),
        ({"sink_length": 2.5}, "sink_length=2.5 is not a number of tokens"),
        ({"max_cache_len": 64}, "max_cache_len=64: .* no static form"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        KiviCache(tiny_model().config, **settings)
    assert "\n" not in str(error.value)


def test_other_models_and_static_caches_are_refused() -> None:
    converted, _ = convert(tiny_model(), ConversionOptions(rope_dim=4, kv_lora_rank=10))
    with pytest.raises(ValueError, match="is converted .* take QuantizedLatentCache"):
        KiviCache(converted.config)
    with pytest.raises(ValueError, match="is converted"):
        bytes_per_token(converted.config, 4, 4096)
    config = tiny_model("qwen3").config  # 12 numbers a head
    with pytest.raises(ValueError, match="1 x 12 codes do not fill bytes"):
        KiviCache(config, group_size=1)
    with pytest.raises(ValueError, match="context=0"):
        bytes_per_token(config, 4, 0)
    config.model_type = "mamba"
    with pytest.raises(ValueError, match="no attention"):
        KiviCache(config)
    model = tiny_model()
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        model.generate(tokens(), past_key_values=KiviCache(model.config), cache_implementation="static")

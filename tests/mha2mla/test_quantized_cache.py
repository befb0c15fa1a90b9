"""The quantised latent cache against one that holds everything and rounds on reading; bytes, beams, crops, ranges."""

import pytest
import torch
from transformers import DynamicCache

from mha2mla import (
    ConversionOptions,
    QuantizedLatentCache,
    cache_bytes,
    calibrate_ranges,
    collect_statistics,
    convert,
    quantization,
    rotate_latents,
)
from mha2mla.families import attention_layers
from mha2mla.quantization import Coded, Range
from tests.tiny import preset, relative, tiny_model, tokens

RANK, ROPE, LAYERS = 16, 8, 2
KEPT = {"residual_length": 5, "sink_length": 2}


@pytest.fixture
def model() -> torch.nn.Module:
    options = preset("best") | {"rope_dim": ROPE, "kv_lora_rank": RANK}
    original = tiny_model()
    return convert(original, ConversionOptions(**options), collect_statistics(original, [tokens(8, 32, seed=5)]))[0]


def through(model: torch.nn.Module, cache: object, ids: torch.Tensor, prompt: int = 12) -> torch.Tensor:
    """Logits of a prompt in two chunks, then of one token at a time."""
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids[:, :prompt].split(8, 1)]
        parts += [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(prompt, ids.shape[1])]
    return torch.cat(parts, 1)


class Rounding(DynamicCache):
    """Keeps all numbers; what it hands out is rounded as the codes would be, outside the first and latest tokens."""

    def __init__(self, bits: int, rope_bits: int | None, group: int, across_tokens: bool = False) -> None:
        super().__init__()
        self.settings = ((bits, group), (rope_bits, min(group, ROPE)))
        self.across_tokens = across_tokens

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        whole = super().update(key_states, value_states, layer_idx)
        return tuple(self.rounded(states, *own) for states, own in zip(whole, self.settings, strict=True))

    def rounded(self, states: torch.Tensor, bits: int | None, group: int) -> torch.Tensor:
        first, last = KEPT["sink_length"], states.shape[2] - KEPT["residual_length"]
        if bits is None or last <= first:
            return states
        middle = states[:, :, first:last]
        if self.across_tokens:  # the wrong axis: one range for all tokens of all channels
            span = Range(
                middle.amin().view(1).repeat(states.shape[-1]), (middle.amax() - middle.amin()).view(1) / 2**bits
            )
            span.scale = span.scale.repeat(states.shape[-1])
        else:
            span = quantization.measure(middle, bits, group)
        codes = quantization.encode(middle, span, bits)
        decoded = quantization.decode(codes, span, bits, states.dtype)
        return torch.cat((states[:, :, :first], decoded, states[:, :, last:]), 2)


@pytest.mark.parametrize("bits", quantization.BITS)
@pytest.mark.parametrize("rope_bits", [None, 8, 4])
def test_logits_are_those_of_rounding_on_reading(model: torch.nn.Module, bits: int, rope_bits: int | None) -> None:
    ids = tokens(2, 30)
    got = through(model, QuantizedLatentCache(model.config, bits, rope_bits, group_size=8, **KEPT), ids)
    assert relative(got, through(model, Rounding(bits, rope_bits, 8), ids)) < 1e-5
    assert relative(got, through(model, Rounding(bits, rope_bits, 8, across_tokens=True), ids)) > 1e-3


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("bits", quantization.BITS)
def test_a_step_attends_to_codes_without_decoding_them(
    model: torch.nn.Module, bits: int, calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(2, 30)
    ranges = calibrate_ranges(model, [ids], bits, 8) if calibrated else None
    cache = QuantizedLatentCache(model.config, bits, 8, group_size=8, ranges=ranges, **KEPT)
    with torch.no_grad():
        model(ids[:, :29], past_key_values=cache)
        with monkeypatch.context() as context:
            context.setattr("mha2mla.quantized_cache.Store.read", None)
            got = model(ids[:, 29:], past_key_values=cache).logits
        decoded = DynamicCache()
        for index, layer in enumerate(cache.layers):
            decoded.update(*(layer.states(slot).dense()[:, :, :29] for slot in (0, 1)), index)
        expected = model(ids[:, 29:], past_key_values=decoded).logits
    assert relative(got, expected) < 1e-5


def test_products_with_codes_are_those_with_what_they_stand_for() -> None:
    generator = torch.Generator().manual_seed(0)
    values, rows = torch.randn(2, 1, 11, 16, generator=generator), torch.randn(2, 6, 16, generator=generator)
    weights = torch.rand(2, 6, 11, generator=generator)
    for bits in quantization.BITS:
        for span in (quantization.measure(values, bits, 8), quantization.fit_channels(values.flatten(0, 2), bits)):
            packed = quantization.encode(values, span, bits)
            decoded = quantization.decode(packed, span, bits, torch.float32)[:, 0]
            coded = Coded(packed, span, bits, torch.float32)
            assert relative(coded.dot(rows), rows @ decoded.mT) < 1e-5
            assert relative(coded.mix(weights), weights @ decoded) < 1e-5
            wrong = Coded(packed, Range(span.low + 1, span.scale), bits, torch.float32)
            assert relative(wrong.mix(weights), weights @ decoded) > 1e-2


def test_fewer_bits_lose_more(model: torch.nn.Module) -> None:
    ids = tokens(2, 30)
    exact = through(model, DynamicCache(), ids)
    errors = [
        relative(through(model, QuantizedLatentCache(model.config, bits, group_size=8, **KEPT), ids), exact)
        for bits in (8, 4, 3, 2)
    ]
    assert errors == sorted(errors) and errors[0] < 0.02 < errors[-1]


@pytest.mark.parametrize("bits", quantization.BITS)
def test_codes_come_back_from_bytes(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 48), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = quantization.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, 48 * bits // 8)
    assert torch.equal(quantization.unpack(packed, bits, torch.float32) + 2 ** (bits - 1), codes.float())


@pytest.mark.parametrize("bits", quantization.BITS)
def test_rounding_is_at_most_half_a_step(bits: int) -> None:
    values = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(0)) * 3 + 1
    span = quantization.measure(values, bits, 16)
    back = quantization.decode(quantization.encode(values, span, bits), span, bits, torch.float32)
    step = span.scale.float().repeat_interleave(16, -1)
    assert ((back - values).abs() <= 0.51 * step + 2e-3).all()


def test_a_channel_with_outliers_is_clipped() -> None:
    samples = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    samples[::500] *= 30
    low, high = samples.amin(0), samples.amax(0)
    plain = Range(low, (high - low) / 15)
    fitted = quantization.fit_channels(samples, 4)

    def error(span: Range) -> float:
        back = quantization.decode(quantization.encode(samples, span, 4), span, 4, torch.float32)
        return float((back - samples).square().mean())

    assert error(fitted) < 0.7 * error(plain)


def test_bytes_are_codes_ranges_and_what_is_kept_whole(model: torch.nn.Module) -> None:
    """256 coded tokens fill a buffer: 4 bits of 16 numbers and two halves a group, the rotated key in 8 bits."""
    kept = KEPT["residual_length"] + KEPT["sink_length"]
    ids = tokens(1, 256 + kept)
    model.config.max_position_embeddings = 512
    cache = QuantizedLatentCache(model.config, 4, 8, group_size=8, **KEPT)
    through(model, cache, ids, prompt=240)
    coded = 256 * (RANK // 2 + 2 * 2 * RANK // 8 + ROPE + 2 * 2)
    assert cache_bytes(cache) == LAYERS * (coded + kept * (RANK + ROPE) * 4)
    ranges = calibrate_ranges(model, [ids], 4, 4)
    cache = QuantizedLatentCache(model.config, 4, 4, ranges=ranges, **KEPT)
    through(model, cache, ids, prompt=240)
    own = sum(2 * 4 * (RANK + ROPE) for _ in range(LAYERS))  # the ranges themselves, once
    assert cache_bytes(cache) == LAYERS * (256 * (RANK + ROPE) // 2 + kept * (RANK + ROPE) * 4) + own
    assert cache.get_seq_length() == ids.shape[1]


def test_calibrated_ranges_fit_their_channels(model: torch.nn.Module) -> None:
    """Control: the ranges of other channels are visibly worse."""
    ids = tokens(2, 30)
    with torch.no_grad():  # channels of unequal size, as real latents have
        for layer in attention_layers(model):
            sizes = torch.logspace(-1, 1, RANK)
            layer.kv_a_proj_with_mqa.weight[:RANK] *= sizes[:, None]
            layer.kv_b_proj.weight /= sizes
    exact = through(model, DynamicCache(), ids)
    ranges = calibrate_ranges(model, [tokens(4, 40, seed=n) for n in range(4)], 4, 8)
    right = through(model, QuantizedLatentCache(model.config, 4, 8, ranges=ranges, **KEPT), ids)
    for own in ranges:
        own.latent = Range(own.latent.low.flip(0), own.latent.scale.flip(0))
    wrong = through(model, QuantizedLatentCache(model.config, 4, 8, ranges=ranges, **KEPT), ids)
    assert relative(right, exact) < 0.3 * relative(wrong, exact)


def test_rotation_changes_nothing_and_spreads_an_outlier(model: torch.nn.Module) -> None:
    ids = tokens(2, 30)
    with torch.no_grad():
        for layer in attention_layers(model):
            layer.kv_a_proj_with_mqa.weight[3] *= 20
            layer.kv_b_proj.weight[:, 3] /= 20
    exact = through(model, DynamicCache(), ids)

    def error() -> float:
        return relative(through(model, QuantizedLatentCache(model.config, 8, group_size=16, **KEPT), ids), exact)

    before = error()
    rotate_latents(model)
    assert relative(through(model, DynamicCache(), ids), exact) < 1e-4
    after = error()
    assert after < 0.85 * before
    with torch.no_grad():
        attention_layers(model)[0].kv_b_proj.weight[:, 0] *= -1  # one projection without the other
    assert relative(through(model, DynamicCache(), ids), exact) > 1e-2


@pytest.mark.parametrize("removed", [1, 4, 9, 20, 27])
def test_a_crop_leaves_what_was_before(model: torch.nn.Module, removed: int) -> None:
    ids = tokens(2, 28)
    cache = QuantizedLatentCache(model.config, 4, 8, group_size=8, **KEPT)
    through(model, cache, ids)
    before = [cache.layers[0].states(slot).dense() for slot in (0, 1)]
    cache.crop(-removed)
    assert cache.get_seq_length() == 28 - removed
    for slot in (0, 1):
        assert torch.equal(cache.layers[0].states(slot).dense(), before[slot][:, :, : 28 - removed])
    through(model, cache, tokens(2, 20, seed=3))
    assert cache.get_seq_length() == 28 - removed + 20
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


def test_beams_and_repeated_batches_take_their_rows_along(model: torch.nn.Module) -> None:
    cache = QuantizedLatentCache(model.config, 4, 8, group_size=8, **KEPT)
    through(model, cache, tokens(3, 24))
    before = [cache.layers[1].states(slot).dense() for slot in (0, 1)]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    for slot in (0, 1):
        assert torch.equal(cache.layers[1].states(slot).dense(), before[slot][[2, 0]])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_gives_what_rounding_on_reading_gives(model: torch.nn.Module, options: dict[str, int]) -> None:
    ids, settings = tokens(2, 14), {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None} | options
    caches = QuantizedLatentCache(model.config, 4, 8, group_size=8, **KEPT), Rounding(4, 8, 8)
    ours, theirs = (model.generate(ids, past_key_values=cache, **settings) for cache in caches)
    assert torch.equal(ours, theirs) and caches[0].get_seq_length() == 23


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "choose one of 2, 3, 4, 8"),
        ({"group_size": 5}, "groups of 5 do not divide 16 channels"),
        ({"rope_bits": 1}, "rotated key of 8: 1 bits"),
    ],
)
def test_sizes_that_cannot_be_coded_are_refused(model: torch.nn.Module, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedLatentCache(model.config, **settings)


def test_ranks_that_do_not_fill_bytes_and_empty_text_are_refused() -> None:
    model, _ = convert(tiny_model(), ConversionOptions(rope_dim=4, kv_lora_rank=10))
    with pytest.raises(ValueError, match="do not fill bytes"):
        QuantizedLatentCache(model.config, 3, group_size=5)
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_ranges(model, [], 4, None)

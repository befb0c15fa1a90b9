"""Decoding at the corners of the sizes: what the forward works in, generation works in, through every cache."""

import pytest
import torch

from mha2mla import ConversionOptions, QuantizedLatentCache, Statistics, collect_statistics, convert
from mha2mla.families import geometry_of
from tests.mha2mla.test_decode import TOLERANCE, step_by_step
from tests.tiny import KV_HEADS, relative, tiny_model, tokens

# Biases, norms on keys, rotation of a part, caps, windows; and each number of key heads.
MODELS = {
    "mqa": ("llama", "mqa", {}),
    "gqa": ("llama", "gqa", {}),
    "mha": ("llama", "mha", {}),
    "biases": ("qwen2", "gqa", {}),
    "window": ("mistral", "gqa", {"sliding_window": 6}),
    "key norms": ("qwen3", "gqa", {}),
    "one key norm": ("olmo2", "gqa", {}),
    "partial rotary": ("gpt_neox", "mha", {}),
    "softcap": ("gemma2", "gqa", {}),
}
PAIRS = {"high": "heads", "rotation-cost": "principal"}  # and the basis they are chosen in
MASK = torch.ones(2, 20, dtype=torch.long)
MASK[0, :5] = 0
GREEDY = {"attention_mask": MASK, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module", params=MODELS)
def original(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Statistics]:
    family, heads, changes = MODELS[request.param]
    model = tiny_model(family, KV_HEADS[heads], **changes)
    return model, collect_statistics(model, [tokens(4, 24, seed=9)])


def corner(original: tuple[torch.nn.Module, Statistics], pairs: str, rotated: str, rank: str) -> torch.nn.Module:
    """Converted with the fewest pairs that rotate, or all, and a latent of one number, or of full rank."""
    model, statistics = original
    geometry = geometry_of(model.config)
    fewest = 2 * geometry.num_kv_heads if pairs == "high" else 2
    rope = fewest if rotated == "fewest" else geometry.rotary_size
    sizes = {"rope_dim": rope, "kv_lora_rank": 1 if rank == "one" else geometry.full_rank(rope)}
    options = ConversionOptions(**sizes, partial_rope=pairs, rope_basis=PAIRS[pairs])
    return convert(model, options, statistics)[0]


@pytest.mark.parametrize("rank", ["one", "full"])
@pytest.mark.parametrize("rotated", ["fewest", "all"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_decoding_equals_the_forward(
    original: tuple[torch.nn.Module, Statistics], pairs: str, rotated: str, rank: str
) -> None:
    model, ids = corner(original, pairs, rotated, rank), tokens(2, 20)
    with torch.no_grad():
        positions = (MASK.cumsum(-1) - 1).clamp_min(0)
        expected = model(ids, attention_mask=MASK, position_ids=positions, use_cache=False).logits
    for kind in ("dynamic", "static"):
        got = step_by_step(model, ids, MASK, kind, chunk=4)
        assert relative(got[MASK.bool()], expected[MASK.bool()]) < TOLERANCE
    said = model.generate(ids, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(ids, **GREEDY), said)
    # Coded caches: with so few tokens between, eight bits change little; all that is kept whole, nothing.
    whole = QuantizedLatentCache(model.config, 8, 8, residual_length=64)
    assert torch.equal(model.generate(ids, **GREEDY, past_key_values=whole), said)
    coded = QuantizedLatentCache(model.config, 8, 8, residual_length=4)
    with torch.no_grad():
        model(ids[:, :19], attention_mask=MASK[:, :19], position_ids=positions[:, :19], past_key_values=coded)
        last = model(ids[:, 19:], attention_mask=MASK, position_ids=positions[:, 19:], past_key_values=coded).logits
    assert relative(last[:, 0], expected[:, -1]) < 0.1


@pytest.mark.parametrize("rank", ["one", "full"])
def test_all_pairs_rotate_in_every_way_to_generate(original: tuple[torch.nn.Module, Statistics], rank: str) -> None:
    """No number of a key is left to the latent, which then holds the values alone."""
    model, ids = corner(original, "high", "all", rank), tokens(2, 20)
    for ways in ({"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}):
        beams = {"num_beams": ways.get("num_beams", 1)}
        assert torch.equal(
            model.generate(ids, **GREEDY, **ways), model.generate(ids, **GREEDY, **beams, use_cache=False)
        )
    assert model.to(torch.bfloat16).generate(ids, **GREEDY).shape == (2, 25)


def test_sizes_beyond_the_corners_are_refused() -> None:
    model = tiny_model()
    for options, message in (
        ({"rope_dim": 0, "kv_lora_rank": 4}, r"rope_dim=0 is outside 2\.\.16"),
        ({"rope_dim": 18, "kv_lora_rank": 4}, r"rope_dim=18 is outside 2\.\.16"),
        ({"rope_dim": 16, "kv_lora_rank": 0}, r"kv_lora_rank=0 with rope_dim=16 is outside 1\.\.16"),
        ({"rope_dim": 16, "kv_lora_rank": 17}, r"kv_lora_rank=17 with rope_dim=16 is outside 1\.\.16"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(model, ConversionOptions(**options))
    narrow = convert(model, ConversionOptions(rope_dim=4, kv_lora_rank=1))[0]
    with pytest.raises(ValueError, match=r"latent of 1 \(layer 0\)"):
        QuantizedLatentCache(narrow.config, 4)

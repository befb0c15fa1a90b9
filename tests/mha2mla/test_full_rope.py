"""rope=full: keys that rotate after the latent. Exact at full rank in every family, in every way to run a model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mha2mla import ConversionOptions, cache_bytes, collect_statistics, convert
from mha2mla.compare import compare
from mha2mla.families import attention_layers, geometry_of
from mha2mla.full_rope import over_distances
from mha2mla.modeling.attention_full_rope_mla import FullRopeMLAAttention
from mha2mla.modeling.attention_mla import rotate
from mha2mla.native import to_deepseek
from mha2mla.options import Geometry
from mha2mla.rotation import Rotation
from mha2mla.served import to_served
from mha2mla.streaming import convert_streamed
from tests.mha2mla.late_rope import (
    LONGROPE,
    NORMED,
    TEXT,
    TOLERANCE,
    both_forwards_agree,
    generates_alike,
    loads_with_and_without_the_package,
    logits,
    packed_is_one_window,
    reconstruction_helps,
    step_by_step,
)
from tests.mha2mla.test_cache_format import formatted
from tests.tiny import FAMILIES, KV_HEADS, SCALINGS, VARIANTS, relative, tiny_model, tokens


def full_rank(model: torch.nn.Module, **changes: object) -> ConversionOptions:
    return ConversionOptions(rope="full", kv_lora_rank=geometry_of(model.config).full_rank(0), **changes)


def exact(family: str, heads: str = "gqa", **changes: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    model = tiny_model(family, KV_HEADS[heads], **changes)
    return model, convert(model, full_rank(model))[0]


@pytest.mark.capability("rope=full")
@pytest.mark.parametrize(("family", "heads"), VARIANTS)
def test_full_rank_gives_the_original_logits(family: str, heads: str) -> None:
    model = tiny_model(family, KV_HEADS[heads])
    converted, report = convert(model, full_rank(model))
    assert relative(logits(converted, tokens()), logits(model, tokens())) < TOLERANCE
    assert report.self_check_error < TOLERANCE and report.geometry.key_scales == 0
    geometry = geometry_of(model.config)
    assert report.cache_size == min(geometry.cache_size, geometry.hidden_size)
    for attention in attention_layers(converted):
        assert type(attention) is FullRopeMLAAttention and attention.rope_dim == 0
        frequencies = attention.rope_frequencies.view(torch.float32)
        attention.rope_frequencies = frequencies.roll(1).contiguous().view(torch.int32)
    # Control: every pair turns as its neighbour should.
    assert relative(logits(converted, tokens()), logits(model, tokens())) > 1e-2


ROPES = [("llama", rope) for rope in SCALINGS.values()] + [("qwen3", SCALINGS["yarn"]), ("phi3", LONGROPE)]


@pytest.mark.parametrize(
    ("family", "rope"), ROPES, ids=lambda value: value if isinstance(value, str) else value["rope_type"]
)
def test_full_rank_is_exact_under_rope_scaling(family: str, rope: dict) -> None:
    """Factors on cos and sin too: queries carry them twice."""
    model, converted = exact(family, rope_parameters=rope)
    assert relative(logits(converted, tokens()), logits(model, tokens())) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "llama"])
def test_biases_of_keys_rotate(family: str) -> None:
    changes = {"attention_bias": True} if family == "llama" else {}
    model, converted = exact(family, **changes)
    expected = logits(model, tokens())
    assert relative(logits(converted, tokens()), expected) < TOLERANCE
    for attention in attention_layers(converted):
        attention.key_bias.data.zero_()
    assert relative(logits(converted, tokens()), expected) > 1e-2


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_gives_the_original_logits(family: str, kind: str, padded: bool) -> None:
    """Windows shorter than the text among them, where the cache forgets its first slots."""
    model, converted = exact(family)
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    full = logits(converted, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    got, keep = step_by_step(converted, ids, mask, kind), mask.bool()
    assert relative(full[keep], expected[keep]) < TOLERANCE
    assert relative(got[keep], expected[keep]) < TOLERANCE


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_queries_turn_by_the_slot_they_are_in(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: queries that always turned as if the last slot that the cache hands out were theirs, or the first."""
    model, converted = exact("llama")
    ids = tokens(2, 20)
    expected = logits(model, ids)
    assert relative(step_by_step(converted, ids, torch.ones_like(ids), kind), expected) < TOLERANCE

    def misplaced(self: torch.nn.Module, query: torch.Tensor, slots: int, _: object) -> torch.Tensor:
        own = torch.arange(query.shape[2]) + (slots - query.shape[2] if kind == "static" else 0)
        return self.rotate_slots(query.transpose(1, 2), own).transpose(1, 2)

    monkeypatch.setattr(FullRopeMLAAttention, "rotate_queries", misplaced)
    assert relative(step_by_step(converted, ids, torch.ones_like(ids), kind), expected) > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "granite"])
def test_both_forwards_are_one_function(family: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values mixed as latents or made from them."""
    both_forwards_agree(exact(family)[1], implementation, monkeypatch)


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generation_is_the_originals(family: str, way: dict) -> None:
    generates_alike(*exact(family), way)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_cache_holds_r_numbers_and_nothing_else(family: str) -> None:
    converted, report = convert(tiny_model(family), ConversionOptions(rope="full", kv_lora_rank=10))
    with torch.no_grad():
        cache = converted(tokens(), use_cache=True).past_key_values
    assert cache_bytes(cache) == 10 * 4 * tokens().numel() * 2 and report.cache_size == 10


CASES = [("qwen2", {}), ("qwen3", {"q_lora_rank": 12}), ("gpt_neox", {"q_lora_rank": 12})]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_round_trip_with_and_without_the_package(family: str, options: dict, tmp_path: Path) -> None:
    model, _ = convert(tiny_model(family), ConversionOptions(rope="full", kv_lora_rank=20, **options))
    loads_with_and_without_the_package(model, tmp_path)


def test_half_precision_keeps_the_frequencies(tmp_path: Path) -> None:
    """Rounded to bfloat16, a frequency is off by up to 0.4 %: by a radian some hundred tokens on."""
    model = tiny_model("llama")
    expected = model.model.rotary_emb.inv_freq.clone()
    converted, _ = convert(model.bfloat16(), full_rank(model))
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    for module in (converted, loaded, loaded.float().half()):
        found = module.model.layers[0].self_attn.rope_frequencies.view(torch.float32)
        assert torch.equal(found, expected) and not torch.equal(found, found.bfloat16().float())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens()), logits(converted, tokens()))


METHODS = [(family, "attention") for family in FAMILIES]
METHODS += [(family, name) for family in ("llama", "qwen3") for name in ("joint", "split", "activation", "balanced")]


@pytest.mark.parametrize(("family", "low_rank"), METHODS)
def test_the_error_falls_with_rank_and_ends(family: str, low_rank: str) -> None:
    model = tiny_model(family)
    statistics = collect_statistics(model, TEXT)
    full = geometry_of(model.config).full_rank(0, low_rank)
    errors = []
    for rank in (full // 4 // 2 * 2, full // 2, full):
        options = ConversionOptions(rope="full", kv_lora_rank=rank, low_rank=low_rank)
        converted, report = convert(model, options, statistics)
        errors.append(sum(layer.activation_error for layer in report.layers))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 < 1e-2 < errors[1]
    assert relative(logits(converted, tokens()), logits(model, tokens())) < TOLERANCE


def test_attention_weighs_keys_by_the_queries_that_meet_them() -> None:
    """Loses less of the attention than factors that do not know them, in a model whose queries look at few numbers."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.view(4, 2, 4, 32)[:, :, 1:] *= 0.05
    statistics = collect_statistics(model, TEXT)
    found = {}
    for low_rank in ("attention", "activation"):
        options = ConversionOptions(rope="full", kv_lora_rank=16, low_rank=low_rank, value_weight=1.0)
        converted, _ = convert(model, options, statistics)
        found[low_rank] = compare(model, converted, [tokens(8, 24, seed=5)]).kl_divergence
    assert found["attention"] < 0.7 * found["activation"]


@pytest.mark.parametrize("still", [0, 3])
def test_moments_are_averaged_over_distances(still: int) -> None:
    """Against the sum written out; `still` numbers behind three pairs never rotate, nor does the last pair."""
    torch.manual_seed(0)
    rows = torch.randn(2, 6 + still, 12)
    moment, rotation = rows @ rows.mT, Rotation(torch.tensor([1.0, 0.3, 0.0]), 1.0, context=50)
    expected, weights = torch.zeros_like(moment), 1 / (1 + torch.arange(50.0))
    for distance, weight in enumerate(weights / weights.sum()):
        angles = -distance * rotation.frequencies
        turned = rotate(torch.eye(6 + still)[:, None, :6], angles.cos(), angles.sin())[:, 0]
        turn = torch.block_diag(turned[:6].T, torch.eye(still))
        expected += weight * turn.T @ moment @ turn
    got = over_distances(moment, rotation)
    assert relative(got, expected) < TOLERANCE and relative(moment, expected) > 0.1
    assert relative(over_distances(moment, replace(rotation, frequencies=-rotation.frequencies)), expected) > 1e-2


@pytest.mark.parametrize("family", NORMED)
def test_norms_are_of_the_keys_that_the_latent_gives(family: str) -> None:
    """A latent that is scaled leaves normed keys as they are: the scale of a key is not cached, it follows."""
    model, converted = exact(family)
    attention = attention_layers(converted)[0]
    latent = torch.randn(2, 1, 9, attention.kv_lora_rank)
    with torch.no_grad():
        keys, values = attention.expand_kv(latent, latent[..., :0])
        larger, more = attention.expand_kv(latent * 7, latent[..., :0])
    assert relative(larger, keys) < 1e-3 and relative(more, 7 * values) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_reconstruction_brings_a_short_latent_nearer(family: str) -> None:
    model = tiny_model(family)
    options = ConversionOptions(rope="full", kv_lora_rank=16, low_rank="attention")
    reconstruction_helps(model, convert(model, options, collect_statistics(model, TEXT))[0])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_few_bits_lose_more_the_fewer_they_are(bits: int) -> None:
    model = tiny_model("qwen3")
    options = full_rank(model, bits=bits, low_rank="attention", context=512)
    statistics = collect_statistics(model, TEXT)
    converted, report = convert(model, options, statistics, batches=TEXT)
    error = relative(logits(converted, tokens(), use_cache=False), logits(model, tokens()))
    low, high = {8: (1e-4, 0.05), 4: (0.05, 0.5), 2: (0.3, 2.0)}[bits]
    assert low < error < high and report.bits == bits * report.cache_size


@pytest.mark.parametrize("scales", ["table", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_decoding_is_one_window_with_simulated_codes(family: str, scales: str) -> None:
    model = formatted(family, scales, rope="full", rope_dim=0, kv_lora_rank=16)
    packed_is_one_window(model, lambda tables: tables.minimum.data.add_(3 * tables.scale.data))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layer_by_layer_is_the_same(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "original")
    options = ConversionOptions(rope="full", kv_lora_rank=16, low_rank="attention")
    convert_streamed(tmp_path / "original", tmp_path / "out", options, list(TEXT), [])
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole, _ = convert(model, options, collect_statistics(model, TEXT))
    assert relative(logits(streamed, tokens()), logits(whole, tokens())) < 2e-4


@pytest.mark.parametrize("export", [to_deepseek, to_served])
def test_exports_refuse_it(export: object) -> None:
    with pytest.raises(ValueError, match=r"^no .* model: it has keys that rotate after the latent \(rope=full\)"):
        export(exact("llama")[1])


def test_layers_share_ranks_and_windows_stay() -> None:
    """With allocated ranks, and with layers of a sliding window left as they are."""
    model = tiny_model("gemma3_text")
    statistics = collect_statistics(model, TEXT)
    options = ConversionOptions(rope="full", kv_lora_rank=12, low_rank="attention", rank_allocation="energy")
    converted, report = convert(model, options, statistics)
    ranks = [layer.kv_lora_rank for layer in report.layers]
    assert sum(ranks) == 24 and ranks[0] != ranks[1] and report.cache_size == 12
    assert (
        relative(step_by_step(converted, tokens(), torch.ones_like(tokens()), "dynamic"), logits(converted, tokens()))
        < TOLERANCE
    )
    half, report = convert(model, full_rank(model, layers="full-attention"))
    assert report.latent_layers == [1]
    got = step_by_step(half, tokens(), torch.ones_like(tokens()), "dynamic")
    assert relative(got, logits(model, tokens())) < TOLERANCE


GEOMETRY = Geometry(hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope": "half"}, "rope='half' is unknown; choose one of: partial, latent, full, auto"),
        ({"rope_dim": 24}, "rope=full .*: rope_dim=24 would have no effect; leave it out"),
        ({"partial_rope": "low", "expected_rotation": True}, "partial_rope=low, expected_rotation=True would have no"),
        ({"kv_lora_rank": 385}, r"kv_lora_rank=385 with rope_dim=0 is outside 1\.\.384"),
    ],
)
def test_options_without_an_effect_are_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConversionOptions(**{"rope": "full", **options}).resolve(GEOMETRY)


def test_sizes_follow_from_the_reduction() -> None:
    resolved = ConversionOptions(rope="full", reduction=0.6875).resolve(GEOMETRY)
    assert (resolved.rope_dim, resolved.kv_lora_rank) == (0, 120) and resolved.resolve(GEOMETRY) == resolved
    normed = Geometry(hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, key_scales=3)
    assert ConversionOptions(rope="full", reduction=0.5).resolve(normed).kv_lora_rank == 192

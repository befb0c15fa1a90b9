"""rope=latent: the rotated key is made from the latent, the only thing that is cached.

The same function as rope=partial where nothing is cut, in every way to run a model.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mha2mla import ConversionOptions, cache_bytes, collect_statistics, convert
from mha2mla.compare import compare
from mha2mla.families import attention_layers, geometry_of
from mha2mla.modeling.attention_late_rope_mla import LateRopeMLAAttention
from mha2mla.modeling.attention_latent_rope_mla import LatentRopeMLAAttention
from mha2mla.native import to_deepseek
from mha2mla.options import Geometry
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

OWN = [family for family in FAMILIES if family not in NORMED]
COST = {"partial_rope": "rotation-cost", "expected_rotation": True}


def options_for(model: torch.nn.Module, share: float = 1.0, **changes: Any) -> ConversionOptions:
    """Full rank, where so large a share of what rotates goes on rotating."""
    geometry = geometry_of(model.config)
    rotated = int(geometry.rotary_size * share)
    rank = geometry.full_rank(0)
    return ConversionOptions(**{"rope": "latent", "rope_dim": rotated, "kv_lora_rank": rank} | COST | changes)


def converted_from(model: torch.nn.Module, share: float = 1.0, **changes: Any) -> torch.nn.Module:
    return convert(model, options_for(model, share, **changes), collect_statistics(model, TEXT))[0]


@pytest.mark.parametrize(("family", "heads"), [variant for variant in VARIANTS if variant[0] in OWN])
def test_full_budget_gives_the_original_logits(family: str, heads: str) -> None:
    model = tiny_model(family, KV_HEADS[heads])
    converted, report = convert(model, options_for(model), collect_statistics(model, TEXT))
    expected = logits(model, tokens())
    assert relative(logits(converted, tokens()), expected) < TOLERANCE and report.self_check_error < TOLERANCE
    assert report.cache_size == min(report.geometry.cache_size, report.geometry.hidden_size)
    for attention in attention_layers(converted):
        assert type(attention) is LatentRopeMLAAttention and attention.rope_dim == 0
        frequencies = attention.rope_frequencies.view(torch.float32)
        attention.rope_frequencies = frequencies.roll(1).contiguous().view(torch.int32)
    # Control: every pair turns as its neighbour should.
    assert relative(logits(converted, tokens()), expected) > 1e-2


@pytest.mark.parametrize("basis", ["heads", "principal"])
@pytest.mark.parametrize("family", OWN)
def test_pairs_are_those_of_partial_rope(family: str, basis: str) -> None:
    """At full rank, whatever stops rotating: the same function, and not the original's."""
    model = tiny_model(family)
    late = converted_from(model, 0.5, rope_basis=basis)
    size = geometry_of(model.config).rotary_size // 2
    rank = geometry_of(model.config).full_rank(size)
    cached = converted_from(model, 0.5, rope_basis=basis, rope="partial", kv_lora_rank=rank)
    expected = logits(cached, tokens())
    assert relative(logits(late, tokens()), expected) < TOLERANCE
    assert relative(logits(model, tokens()), expected) > 5e-3


ROPES = [("llama", rope) for rope in SCALINGS.values()] + [("phi3", LONGROPE)]


@pytest.mark.parametrize(
    ("family", "rope"), ROPES, ids=lambda value: value if isinstance(value, str) else value["rope_type"]
)
def test_exact_under_rope_scaling(family: str, rope: dict) -> None:
    model = tiny_model(family, rope_parameters=rope)
    assert relative(logits(converted_from(model), tokens()), logits(model, tokens())) < TOLERANCE


@pytest.mark.parametrize("folding", [1, 2])
@pytest.mark.parametrize("strategy", ["high", "2-norm", "rotation-cost"])
def test_every_choice_of_pairs_has_one_shared_key(strategy: str, folding: int) -> None:
    if strategy != "rotation-cost" and folding > 1:
        pytest.skip("frequencies fold in the principal basis alone")
    model = tiny_model("llama")
    basis = "principal" if folding > 1 else "heads"
    changes = {"partial_rope": strategy, "rope_basis": basis, "frequency_folding": folding}
    late = converted_from(model, 0.5, **changes)
    rank = geometry_of(model.config).full_rank(geometry_of(model.config).rotary_size // 2)
    cached = converted_from(model, 0.5, **changes, rope="partial", kv_lora_rank=rank)
    assert relative(logits(late, tokens()), logits(cached, tokens())) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "llama"])
def test_biases_of_keys_rotate(family: str) -> None:
    model = tiny_model(family, **({"attention_bias": True} if family == "llama" else {}))
    converted, expected = converted_from(model), logits(model, tokens())
    assert relative(logits(converted, tokens()), expected) < TOLERANCE
    for attention in attention_layers(converted):
        attention.key_bias.data.zero_()
    assert relative(logits(converted, tokens()), expected) > 1e-2


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", OWN)
def test_decoding_gives_the_original_logits(family: str, kind: str, padded: bool) -> None:
    """Windows shorter than the text among them, where the cache forgets its first slots."""
    model, ids = tiny_model(family), tokens(2, 20)
    converted, mask = converted_from(model), torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    got, keep = step_by_step(converted, ids, mask, kind), mask.bool()
    assert relative(got[keep], expected[keep]) < TOLERANCE


def test_queries_turn_by_the_slot_they_are_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: queries that always turned as if the cache's first slots were theirs."""
    model, ids = tiny_model("llama"), tokens(2, 20)
    converted, expected = converted_from(model), logits(model, ids)

    def misplaced(self: Any, query: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.rotate_slots(query.transpose(1, 2), torch.arange(query.shape[2])).transpose(1, 2)

    monkeypatch.setattr(LateRopeMLAAttention, "rotate_queries", misplaced)
    assert relative(step_by_step(converted, ids, torch.ones_like(ids), "dynamic"), expected) > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen2", "phi3", "granite"])
def test_both_forwards_are_one_function(family: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both_forwards_agree(converted_from(tiny_model(family), 0.5), implementation, monkeypatch)


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generation_is_the_originals(family: str, way: dict) -> None:
    model = tiny_model(family)
    generates_alike(model, converted_from(model), way)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_cache_holds_r_numbers_and_nothing_else(family: str) -> None:
    model = tiny_model(family)
    options = options_for(model, 0.5, kv_lora_rank=10)
    converted, report = convert(model, options, collect_statistics(model, TEXT))
    with torch.no_grad():
        cache = converted(tokens(), use_cache=True).past_key_values
    assert cache_bytes(cache) == 10 * 4 * tokens().numel() * 2 and report.cache_size == 10


@pytest.mark.parametrize(("family", "changes"), [("qwen2", {}), ("gpt_neox", {"q_lora_rank": 12})])
def test_round_trip_with_and_without_the_package(family: str, changes: dict, tmp_path: Path) -> None:
    model = converted_from(tiny_model(family), 0.5, kv_lora_rank=20, **changes)
    loads_with_and_without_the_package(model, tmp_path)


@pytest.mark.parametrize("low_rank", ["attention", "joint", "split", "activation", "balanced"])
def test_the_error_falls_with_rank_and_ends(low_rank: str) -> None:
    model = tiny_model("llama")
    statistics = collect_statistics(model, TEXT)
    full = geometry_of(model.config).full_rank(0, low_rank)
    errors = []
    for rank in (full // 4 // 2 * 2, full // 2, full):
        options = options_for(model, kv_lora_rank=rank, low_rank=low_rank)
        converted, report = convert(model, options, statistics)
        errors.append(sum(layer.activation_error for layer in report.layers))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 < 1e-2 < errors[1]
    assert relative(logits(converted, tokens()), logits(model, tokens())) < TOLERANCE


def test_more_rotation_is_nearer() -> None:
    model, found = tiny_model("llama"), []
    for share in (0.25, 0.5, 1.0):
        found.append(compare(model, converted_from(model, share), [tokens(8, 24, seed=5)]).kl_divergence)
    assert found == sorted(found, reverse=True) and found[-1] < 1e-6 < 1e-4 < found[0]


@pytest.mark.parametrize("scales", ["table", "token"])
@pytest.mark.parametrize("family", OWN)
def test_packed_decoding_is_one_window_with_simulated_codes(family: str, scales: str) -> None:
    model = formatted(family, scales, rope="latent", rope_dim=8, kv_lora_rank=16)
    packed_is_one_window(model, lambda tables: tables.minimum.data.copy_(tables.minimum.data.roll(1)))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_reconstruction_brings_a_short_latent_nearer(family: str) -> None:
    model = tiny_model(family)
    reconstruction_helps(model, converted_from(model, 0.5, kv_lora_rank=16, low_rank="attention"))


def test_layer_by_layer_is_the_same(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path / "original")
    options = options_for(model, 0.5, kv_lora_rank=16, low_rank="attention", rope_basis="principal")
    convert_streamed(tmp_path / "original", tmp_path / "out", options, list(TEXT), [])
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole, _ = convert(model, options, collect_statistics(model, TEXT))
    assert relative(logits(streamed, tokens()), logits(whole, tokens())) < 2e-4


@pytest.mark.parametrize("export", [to_deepseek, to_served])
def test_exports_refuse_it(export: object) -> None:
    with pytest.raises(ValueError, match=r"^no .* model: it has keys that rotate after the latent \(rope=latent\)"):
        export(converted_from(tiny_model("llama")))


@pytest.mark.parametrize("family", NORMED)
def test_norms_on_keys_are_refused(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(ValueError, match=r"rope=latent cannot absorb keys that pass a norm.*method=full-rope"):
        convert(model, ConversionOptions(rope="latent"))


GEOMETRY = Geometry(hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64)


def test_sizes_follow_from_the_reduction() -> None:
    """What rotates takes no place in the cache."""
    resolved = ConversionOptions(rope="latent", reduction=0.6875, **COST).resolve(GEOMETRY)
    assert (resolved.rope_dim, resolved.kv_lora_rank) == (96, 120) and resolved.resolve(GEOMETRY) == resolved
    bits = ConversionOptions(rope="latent", bits="auto", reduction=0.875, **COST).resolve(GEOMETRY)
    assert (bits.rope_dim, bits.kv_lora_rank) == (96, 384)
    with pytest.raises(ValueError, match=r"kv_lora_rank=385 with rope_dim=96 is outside 1\.\.384"):
        ConversionOptions(rope="latent", kv_lora_rank=385, **COST).resolve(GEOMETRY)


@pytest.mark.parametrize(
    ("bits", "key_scales", "rope"), [(16, 0, "partial"), (16, 3, "partial"), ("auto", 0, "latent"), (2, 3, "full")]
)
def test_what_auto_is_for_a_model(bits: int | str, key_scales: int, rope: str) -> None:
    geometry = replace(GEOMETRY, key_scales=key_scales)
    resolved = ConversionOptions(rope="auto", bits=bits, **COST).resolve(geometry)
    assert resolved.rope == rope and resolved.resolve(geometry) == resolved
    assert resolved.partial_rope == ("high" if rope == "full" else "rotation-cost")

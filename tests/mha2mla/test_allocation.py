"""Layers of unequal rank: one total budget, more to layers that need it, saved, loaded and decoded like any other."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from mha2mla import ConversionOptions, cache_bytes, collect_statistics, convert
from mha2mla.allocation import LEAST, MOST, STRATEGIES
from mha2mla.compare import compare
from tests.tiny import relative, tiny_model, tokens

UNEQUAL = [name for name in STRATEGIES if name != "uniform"]
RANK, LAYERS = 10, 4


def uneven_model() -> torch.nn.Module:
    """Keys and values of the first layers lie in few directions."""
    model = tiny_model(num_hidden_layers=LAYERS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer, rank in zip(model.model.layers, (2, 4, 16, 16), strict=True):
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                left, right = torch.randn(16, rank, generator=generator), torch.randn(rank, 32, generator=generator)
                projection.weight.copy_(0.3 * left @ right / rank**0.5)
    return model


def converted(allocation: str) -> tuple[torch.nn.Module, torch.nn.Module, list[int]]:
    model = uneven_model()
    options = ConversionOptions(
        rope_dim=4, kv_lora_rank=RANK, partial_rope="rotation-cost", low_rank="attention", rank_allocation=allocation
    )
    result, report = convert(model, options, collect_statistics(model, [tokens(16, 24, seed=1)]))
    assert report.cache_size == 4 + RANK
    return model, result, [layer.kv_lora_rank for layer in report.layers]


@pytest.mark.parametrize("allocation", UNEQUAL)
def test_ranks_differ_within_bounds_and_share_the_budget(allocation: str) -> None:
    _, _, ranks = converted(allocation)
    assert sum(ranks) == RANK * LAYERS
    assert all(int(LEAST * RANK) <= rank <= int(MOST * RANK) for rank in ranks)
    assert len(set(ranks)) > 1


def test_energy_goes_to_layers_of_many_directions_and_comes_nearer_to_the_original() -> None:
    found = {}
    for allocation in ("uniform", "energy"):
        model, result, ranks = converted(allocation)
        found[allocation] = compare(model, result, [tokens(8, 24, seed=5)]).kl_divergence
    assert max(ranks[:2]) < min(ranks[2:])
    assert found["energy"] < 0.95 * found["uniform"]


def test_care_goes_to_the_layer_whose_next_direction_is_most_of_what_it_still_loses() -> None:
    """Mean rank 4: both start at 2, so the shares are 0.4 / 0.7 and 0.2 / 0.8, and the first takes all it may."""
    steep, flat = torch.tensor([1.0, 0.5, 0.4, 0.2, 0.1, 0.0]), torch.tensor([1.0] * 2 + [0.2] * 4)
    assert STRATEGIES["care"]([steep, flat], 4) == [6, 2]
    assert STRATEGIES["care"]([flat, steep], 4) == [2, 6]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("allocation", UNEQUAL)
@torch.no_grad()
def test_a_reloaded_checkpoint_decodes_through_caches_of_its_own_sizes(
    allocation: str, kind: str, tmp_path: Path
) -> None:
    _, model, ranks = converted(allocation)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(2, 16)
    expected = model(ids, use_cache=False).logits
    static = StaticCache(config=model.config, max_cache_len=16)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else static
    steps = [model(ids[:, :10], past_key_values=cache).logits]
    steps += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(10, 16)]
    assert relative(torch.cat(steps, dim=1), expected) < 1e-5
    assert cache_bytes(cache) == 2 * 16 * 4 * (sum(ranks) + 4 * LAYERS)


def test_a_full_budget_fills_every_layer() -> None:
    energies = [torch.linspace(1, 0.1, 12), torch.logspace(0, -6, 12)]
    for allocation in STRATEGIES.values():
        assert allocation(energies, 12) == [12, 12]
        assert sum(allocation(energies, 7)) == 14


def test_split_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="rank_allocation=care compares.*low_rank=split"):
        convert(tiny_model(), ConversionOptions(kv_lora_rank=8, low_rank="split", rank_allocation="care"))

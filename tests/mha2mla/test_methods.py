"""The ladder for the strategies that look at activations: exact at full budget, better with more, and each worth it."""

import pytest
import torch

from mha2mla import ConversionOptions, Statistics, collect_statistics, convert
from mha2mla.basis import principal
from mha2mla.families import geometry_of
from mha2mla.layer import head_moments, input_moment
from mha2mla.low_rank import STRATEGIES, Stack, Weights, weighted_svd
from mha2mla.partial_rope import Pairs, mean_rotation, rotation_cost, rotation_loss
from tests.tiny import KV_HEADS, SCALINGS, VARIANTS, preset, relative, tiny_model, tokens

TOLERANCE = 1e-5  # float32 rounding through two layers; 2e-6 is measured
METHODS = {name: preset(name) for name in ("best", "transmla", "care")} | {
    "energy": {"partial_rope": "rotation-cost", "low_rank": "attention", "rank_allocation": "energy"},
    "heads": {"partial_rope": "rotation-cost", "rope_basis": "heads", "low_rank": "activation"},
    "activation": {"partial_rope": "high", "low_rank": "activation"},
}


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def calibrated(model: torch.nn.Module) -> Statistics:
    return collect_statistics(model, tokens(16, 24, seed=1).split(4))


@pytest.mark.parametrize(("family", "heads"), VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_full_budget_gives_the_original_logits(method: str, family: str, heads: str) -> None:
    model = tiny_model(family, KV_HEADS[heads])
    geometry = geometry_of(model.config)
    if METHODS[method]["partial_rope"] == "evenly-spaced" and geometry.key_scales > 1:
        pytest.skip("evenly spaced pairs need a basis that heads with norms of their own cannot have")
    rope = geometry.rotary_size
    full = ConversionOptions(rope_dim=rope, kv_lora_rank=geometry.full_rank(rope), **METHODS[method])
    converted, _ = convert(model, full, calibrated(model))
    assert relative(logits(converted, tokens()), logits(model, tokens())) < TOLERANCE


@pytest.mark.parametrize("scaling", SCALINGS)
def test_full_budget_is_exact_under_rope_scaling(scaling: str) -> None:
    model = tiny_model(rope_parameters=SCALINGS[scaling])
    full = ConversionOptions(rope_dim=16, kv_lora_rank=16, **METHODS["best"])
    converted, _ = convert(model, full, calibrated(model))
    assert relative(logits(converted, tokens()), logits(model, tokens())) < TOLERANCE


def test_a_wrong_basis_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a basis that is not orthogonal changes the scores, even at full budget."""
    model = tiny_model()
    full = ConversionOptions(rope_dim=16, kv_lora_rank=16, **METHODS["best"])
    monkeypatch.setitem(
        __import__("mha2mla.basis").basis.STRATEGIES, "principal", lambda moment: principal(moment) * 1.1
    )
    converted, _ = convert(model, full, calibrated(model))
    assert relative(logits(converted, tokens()), logits(model, tokens())) > 1e-2


@pytest.mark.parametrize("heads", KV_HEADS)
def test_folding_is_exact_for_frequencies_that_are_equal(heads: str) -> None:
    """Control: for a model's own frequencies it is an approximation, even at full budget."""
    model, keys = tiny_model(kv_heads=KV_HEADS[heads]), 8 * KV_HEADS[heads]
    folded = METHODS["best"] | {"frequency_folding": 2}
    full = ConversionOptions(rope_dim=keys, kv_lora_rank=min(keys, 32), **folded)

    def error() -> float:
        converted, _ = convert(model, full, calibrated(model))
        converted.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq
        return relative(logits(converted, tokens()), logits(model, tokens()))

    assert error() > 1e-2
    model.model.rotary_emb.inv_freq = torch.tensor([0.9, 0.9, 0.01, 0.01])
    assert error() < TOLERANCE


def test_folding_keeps_more_of_the_energy_in_as_many_pairs() -> None:
    model, kept = tiny_model(kv_heads=4), []
    model.model.rotary_emb.inv_freq = torch.full((4,), 0.3)
    ids = tokens()
    for folding in (1, 4):
        options = METHODS["best"] | {"frequency_folding": folding, "expected_rotation": False}
        converted, _ = convert(model, ConversionOptions(rope_dim=8, kv_lora_rank=24, **options), calibrated(model))
        converted.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq
        kept.append(relative(logits(converted, ids), logits(model, ids)))
    assert kept[1] < kept[0]


@pytest.mark.parametrize("method", METHODS)
def test_rope_alone_keeps_the_values(method: str) -> None:
    """At full rank only rotation is lost: the values' and unrotated keys' weights come back exactly."""
    model = tiny_model("qwen2")
    options = ConversionOptions(rope_dim=8, kv_lora_rank=24, **METHODS[method])
    _, report = convert(model, options, calibrated(model))
    assert max(max(layer.key_error, layer.value_error) for layer in report.layers) < 1e-4
    short = ConversionOptions(rope_dim=8, kv_lora_rank=8, **METHODS[method])
    _, report = convert(model, short, calibrated(model))
    assert min(layer.value_error for layer in report.layers) > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_error_falls_as_the_rank_rises(method: str) -> None:
    model = tiny_model()
    statistics = calibrated(model)
    errors = []
    for rank in (2, 6, 10, 14, 16):
        options = ConversionOptions(rope_dim=16, kv_lora_rank=rank, **METHODS[method])
        _, report = convert(model, options, statistics)
        errors.append(sum(layer.activation_error or 0.0 for layer in report.layers))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 < errors[-2]


def stack_of(model: torch.nn.Module, rank: int) -> Stack:
    generator = torch.Generator().manual_seed(3)
    statistics = calibrated(model).layers[1]
    layer = model.model.layers[1].self_attn
    queries = torch.cat((layer.q_proj.weight.detach().view(4, 8, 32), torch.zeros(4, 8, 1)), dim=2)
    return Stack(
        layer.k_proj.weight.detach().view(2, 8, 32),
        layer.v_proj.weight.detach().view(2, 8, 32),
        rank,
        statistics.input_moment,
        head_moments(queries, input_moment(statistics)).view(2, 2, 8, 8).sum(1),
        torch.randn(2, 8, 8, generator=generator).square().mT @ torch.eye(8),
        value_weight=0.35,
    )


def activation_loss(stack: Stack, down: torch.Tensor, up: torch.Tensor) -> float:
    difference = stack.rows - up @ down
    return float(((difference @ stack.input_moment) * difference).sum())


def test_activation_aware_factors_are_best_on_activations() -> None:
    """Below full rank no other strategy loses less of W x; the plain SVD loses less of W."""
    model = tiny_model()
    with torch.no_grad():  # inputs of unequal variance: what plain SVD does not see
        model.model.layers[1].input_layernorm.weight *= torch.linspace(0.1, 4, 32)
    stack = stack_of(model, rank=8)
    found = {name: STRATEGIES[name](stack) for name in ("joint", "activation", "balanced")}
    losses = {name: activation_loss(stack, *factors) for name, factors in found.items()}
    assert losses["activation"] < min(0.9 * losses["joint"], losses["balanced"])
    plain = {name: float((stack.rows - up @ down).norm()) for name, (down, up) in found.items()}
    assert plain["joint"] == min(plain.values())


def test_up_projection_is_the_least_squares_fit() -> None:
    stack = stack_of(tiny_model(), rank=6)
    weight = torch.diag(torch.linspace(0.2, 3, 32))
    down, up = weighted_svd(stack.rows, Weights(stack.input_moment, weight), 6)
    best = activation_loss(stack, down, up)
    for seed in range(3):
        nudge = 1e-2 * torch.randn(up.shape, generator=torch.Generator().manual_seed(seed))
        assert activation_loss(stack, down, up + nudge) > best


def test_principal_basis_is_orthogonal_and_sorted() -> None:
    moment = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0))
    moment = moment @ moment.mT
    basis = principal(moment)
    assert torch.allclose(basis @ basis.mT, torch.eye(3).expand(5, 3, 3), atol=1e-5)
    energy = torch.einsum("fjg,fgh,fjh->fj", basis, moment, basis)
    assert (energy[:, :-1] >= energy[:, 1:]).all()


def test_rotation_cost_leaves_slow_pairs_alone() -> None:
    """Energy alone does not earn rotation: a strong pair that hardly turns costs less than a weak one that does."""
    model = tiny_model()
    geometry = convert(model, ConversionOptions(kv_lora_rank=8))[1].geometry
    turn = rotation_loss(torch.tensor([1.0, 0.1, 1e-2, 1e-4]), context=64)
    energy = torch.tensor([[1.0, 0.5], [1.0, 0.5], [1.0, 0.5], [100.0, 50.0]])
    kept = rotation_cost(Pairs(geometry, 4, turn[:, None].expand(-1, 2), energy, torch.ones_like(energy)))
    assert kept.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert turn[0] > turn[1] > turn[2] > 100 * turn[3]


def test_mean_rotation_against_the_sum_by_hand() -> None:
    weights = torch.tensor([0.5, 0.3, 0.2])
    frequency = torch.tensor([0.7])
    expected = sum(w * complex(torch.tensor(0.7 * d).cos(), torch.tensor(0.7 * d).sin()) for d, w in enumerate(weights))
    assert abs(complex(mean_rotation(frequency, weights)[0]) - complex(expected)) < 1e-6

"""Layer-wise reconstruction brings a converted model nearer to its original and touches nothing but its attention."""

import pytest
import torch

from mha2mla import ConversionOptions, collect_statistics, convert, reconstruct
from mha2mla.compare import compare
from tests.tiny import tiny_model, tokens


def pair(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.nn.Module]:
    model = tiny_model().to(dtype)
    statistics = collect_statistics(model, [tokens(16, 24)])
    options = ConversionOptions(
        rope_dim=4, kv_lora_rank=8, partial_rope="rotation-cost", rope_basis="principal", low_rank="attention"
    )
    return model, convert(model, options, statistics)[0]


def test_it_brings_the_logits_nearer_and_more_steps_nearer_still() -> None:
    text, found = tokens(64, 24).split(4), []
    for steps in (0, 20, 200):
        model, converted = pair()
        fits = reconstruct(model, converted, text, steps, learning_rate=2e-2)
        found.append(compare(model, converted, [tokens(8, 24, seed=5)]).kl_divergence)
        assert len(fits) == 2 and all(fit.after <= fit.before for fit in fits)
    assert found[2] < 0.9 * found[0] and found == sorted(found, reverse=True)


def test_only_attention_changes() -> None:
    model, converted = pair()
    before = {name: tensor.clone() for name, tensor in converted.state_dict().items()}
    theirs = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reconstruct(model, converted, tokens(8, 24).split(4), steps=3)
    changed = {name for name, tensor in converted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".self_attn." in name and name.endswith("_proj.weight")} | {
        name for name in before if name.endswith("kv_a_proj_with_mqa.weight")
    }
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in converted.parameters())


def test_zero_steps_change_nothing_and_a_full_budget_has_nothing_to_learn() -> None:
    model = tiny_model()
    exact, _ = convert(model, ConversionOptions(rope_dim=16, kv_lora_rank=16))
    fits = reconstruct(model, exact, tokens(8, 24).split(4), steps=0)
    assert max(fit.before for fit in fits) < 1e-8
    _, lossy = pair()
    assert min(fit.before for fit in reconstruct(model, lossy, tokens(8, 24).split(4), steps=0)) > 1e-2


def test_half_precision_stays_half_precision() -> None:
    model, converted = pair(torch.bfloat16)
    fits = reconstruct(model, converted, tokens(32, 24).split(4), steps=30, learning_rate=2e-2)
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.bfloat16}
    assert all(fit.after < fit.before for fit in fits)


def test_under_autocast_every_step_sees_the_weights_of_the_last() -> None:
    """autocast keeps its half-precision copies of weights until it ends; trained on those, a layer never improves."""
    text, fits = tokens(64, 24).split(4), {}
    for enabled in (False, True):
        model, converted = pair()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            fits[enabled] = reconstruct(model, converted, text, steps=30, learning_rate=2e-2)
    for full, half in zip(fits[False], fits[True], strict=True):
        assert full.after < 0.9 * full.before and half.after < 1.1 * full.after


def test_a_rate_that_ruins_a_layer_leaves_it_its_closed_form() -> None:
    """To the last bit; and one that is too fast at first still ends below the closed form, with a lower one."""
    text = tokens(64, 24).split(4)
    model, converted = pair()
    closed = {name: tensor.clone() for name, tensor in converted.state_dict().items()}
    fits = reconstruct(model, converted, text, steps=8, learning_rate=1e6)
    assert all(fit.after == fit.before and fit.rate == 0 for fit in fits)
    assert all(torch.equal(tensor, closed[name]) for name, tensor in converted.state_dict().items())
    fits = reconstruct(model, converted, text, steps=80, learning_rate=0.3)
    assert all(fit.after < 0.95 * fit.before and 0 < fit.rate < 0.3 for fit in fits)


def test_the_rate_suits_weights_of_any_scale() -> None:
    """The same function with projections as small and a norm as large as another family has them: the same fit."""
    text, fits = tokens(64, 24).split(4), []
    for scale in (1.0, 0.01):
        model, converted = pair()
        for layer in converted.model.layers:
            layer.input_layernorm.weight.data /= scale
            for projection in (layer.self_attn.q_proj, layer.self_attn.kv_a_proj_with_mqa):
                projection.weight.data *= scale
        fits.append(reconstruct(model, converted, text, steps=30, learning_rate=1e-2))
    for small, large in zip(*fits, strict=True):
        assert small.after < 0.95 * small.before and large.after == pytest.approx(small.after, rel=0.02)


def test_a_layer_is_judged_on_text_that_it_does_not_see() -> None:
    """Text that repeats is learned by heart: a judgement on what is fitted would call that a gain."""
    model, converted = pair()
    seen, unseen = tokens(1, 24).expand(14, -1), tokens(2, 24, seed=9)
    fits = reconstruct(model, converted, [seen, unseen], steps=200, learning_rate=3e-2)
    model, converted = pair()
    flattered = reconstruct(model, converted, [tokens(1, 24).expand(16, -1)], steps=200, learning_rate=3e-2)
    assert flattered[0].after < 0.5 * flattered[0].before and fits[0].after > 0.7 * fits[0].before


def test_one_sequence_is_too_little_to_judge_by() -> None:
    model, converted = pair()
    with pytest.raises(ValueError, match="it needs at least 2, not 1"):
        reconstruct(model, converted, [tokens(1, 24)], steps=3)


def test_no_text_is_an_error() -> None:
    model, converted = pair()
    with pytest.raises(ValueError, match="it needs at least 2, not 0"):
        reconstruct(model, converted, [], steps=3)

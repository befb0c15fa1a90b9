"""At full budget conversion changes nothing; below it, it must. Every family and attention type, both directions."""

import pytest
import torch

from mha2mla import ConversionOptions, collect_statistics, convert
from mha2mla.families import geometry_of
from mha2mla.self_check import EXACT, self_check
from tests.tiny import FAMILIES, KV_HEADS, SCALINGS, VARIANTS, relative, tiny_model, tokens

# float32 rounding through two layers measures 1e-7 to 2e-6 here; a wrong row or factor measures above 1e-1.
TOLERANCE = 1e-5


def full_budget(model: torch.nn.Module, **changes: object) -> ConversionOptions:
    geometry = geometry_of(model.config)
    return ConversionOptions(
        rope_dim=geometry.rotary_size, kv_lora_rank=geometry.full_rank(geometry.rotary_size), **changes
    )


def logits(model: torch.nn.Module, ids: torch.Tensor, **inputs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


@pytest.mark.capability("exact at full budget")
@pytest.mark.parametrize(("family", "heads"), VARIANTS)
def test_full_budget_gives_the_original_logits(family: str, heads: str) -> None:
    model = tiny_model(family, KV_HEADS[heads])
    converted, report = convert(model, full_budget(model))
    assert relative(logits(converted, tokens()), logits(model, tokens())) < TOLERANCE
    assert report.self_check_error < TOLERANCE


@pytest.mark.parametrize("scaling", SCALINGS)
def test_full_budget_is_exact_under_rope_scaling(scaling: str) -> None:
    model = tiny_model(rope_parameters=SCALINGS[scaling])
    converted, _ = convert(model, full_budget(model))
    assert relative(logits(converted, tokens()), logits(model, tokens())) < TOLERANCE


@pytest.mark.parametrize("low_rank", ["joint", "split"])
@pytest.mark.parametrize("heads", KV_HEADS)
def test_full_rank_equals_rope_alone(low_rank: str, heads: str) -> None:
    """With full rank only the rotation is lost: two factorings of it agree, and differ from the original."""
    model = tiny_model("qwen2", KV_HEADS[heads])
    rope = 2 * KV_HEADS[heads]
    rank = 2 * 8 * KV_HEADS[heads] - rope
    full = ConversionOptions(
        rope_dim=rope, kv_lora_rank=min(rank, 32) if low_rank == "joint" else rank, low_rank=low_rank
    )
    converted, report = convert(model, full)
    rotation_lost = without_rotation(model, rope // KV_HEADS[heads] // 2)
    assert relative(logits(converted, tokens()), rotation_lost) < TOLERANCE
    assert relative(logits(converted, tokens()), logits(model, tokens())) > 0.05
    assert max(layer.key_error for layer in report.layers) < TOLERANCE


def without_rotation(model: torch.nn.Module, kept: int) -> torch.Tensor:
    """The original's logits with all but its `kept` fastest frequencies set to zero: an independent reference."""
    frequencies = model.model.rotary_emb.inv_freq
    saved = frequencies.clone()
    frequencies[kept:] = 0
    result = logits(model, tokens())
    frequencies.copy_(saved)
    return result


def test_yarn_scale_survives_on_unrotated_pairs() -> None:
    """YaRN multiplies cos and sin: pairs that stop rotating must keep that factor (control: they differ without)."""
    model = tiny_model(rope_parameters=SCALINGS["yarn"])
    assert model.model.rotary_emb.attention_scaling != 1
    converted, _ = convert(model, ConversionOptions(rope_dim=4, kv_lora_rank=28))
    expected = without_rotation(model, 1)
    assert relative(logits(converted, tokens()), expected) < TOLERANCE
    for layer in converted.model.layers:
        rows = layer.self_attn.q_proj.weight.view(4, 8, 32)
        rows.data[:, :6] /= model.model.rotary_emb.attention_scaling**2
    assert relative(logits(converted, tokens()), expected) > 1e-2


def test_query_low_rank_is_exact_at_full_rank_and_not_below() -> None:
    model = tiny_model("qwen2")
    exact, _ = convert(model, full_budget(model, q_lora_rank=32))
    lossy, _ = convert(model, full_budget(model, q_lora_rank=8))
    assert not hasattr(exact.model.layers[0].self_attn, "q_proj")
    assert relative(logits(exact, tokens()), logits(model, tokens())) < TOLERANCE
    assert relative(logits(lossy, tokens()), logits(model, tokens())) > 0.05


def test_untied_embeddings_stay_untied() -> None:
    model = tiny_model(tie_word_embeddings=False)
    converted, _ = convert(model, full_budget(model))
    assert converted.lm_head.weight.data_ptr() != converted.model.embed_tokens.weight.data_ptr()
    assert relative(logits(converted, tokens()), logits(model, tokens())) < TOLERANCE


def test_base_model_converts_too() -> None:
    model = tiny_model().model
    converted, _ = convert(model, full_budget(model))
    with torch.no_grad():
        assert relative(converted(tokens())[0], model(tokens())[0]) < TOLERANCE


def test_attention_bias_of_llama() -> None:
    model = tiny_model(attention_bias=True)
    converted, _ = convert(model, full_budget(model))
    assert relative(logits(converted, tokens()), logits(model, tokens())) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_error_falls_as_rank_rises(family: str) -> None:
    model = tiny_model(family)
    expected = logits(model, tokens())
    errors, rope = [], geometry_of(model.config).rotary_size
    full = geometry_of(model.config).full_rank(rope)
    for rank in (full // 4, full // 2, full - 4, full):
        converted, report = convert(model, ConversionOptions(rope_dim=rope, kv_lora_rank=rank))
        errors.append(sum(layer.value_error for layer in report.layers))
        last = relative(logits(converted, tokens()), expected)
    assert errors == sorted(errors, reverse=True) and errors[-1] < TOLERANCE < errors[-2]
    assert last < TOLERANCE


def test_conversion_leaves_the_original_alone() -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted, _ = convert(model, ConversionOptions(rope_dim=4, kv_lora_rank=8))
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_self_check_notices_an_attention_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a family whose attention does more than projections, rotation and softmax is refused."""
    model = tiny_model()
    original = type(model.model.layers[0].self_attn).forward

    def normed(self: torch.nn.Module, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> tuple:
        return original(self, hidden_states / hidden_states.norm(dim=-1, keepdim=True), *args, **kwargs)

    assert self_check(model) < EXACT
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", normed)
    with pytest.raises(ValueError, match="not exact at full budget"):
        self_check(model)


def test_two_norm_follows_the_statistics() -> None:
    """2-norm keeps the pairs with the largest E‖q‖·E‖k‖: weights that enlarge one pair must make it kept."""
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            rows = layer.self_attn.k_proj.weight.view(2, 2, 4, 32)
            rows[0, :, 3] *= 50
            rows[1, :, 1] *= 50
    statistics = collect_statistics(model, [tokens()])
    converted, _ = convert(model, ConversionOptions(rope_dim=4, kv_lora_rank=8, partial_rope="2-norm"), statistics)
    assert converted.model.layers[0].self_attn.rope_pair_index.tolist() == [[3], [1]]

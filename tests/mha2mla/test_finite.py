"""Numbers that are not finite end in one line that says whose they are and where they begin; zeros are numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from mha2mla import ConversionOptions, calibrate_ranges, collect_statistics, convert, reconstruct
from mha2mla.compare import compare
from mha2mla.families import attention_layers, geometry_of
from mha2mla.finite import FiniteScores, first_not_finite, is_finite, largest
from mha2mla.layerwise import embed, pass_layer
from mha2mla.partial_rope import rotation_loss
from mha2mla.projections import read_norms
from mha2mla.streaming import convert_streamed
from tests.tiny import preset, tiny_model, tokens

BEST = ConversionOptions(**preset("best"), reduction=0.5)
PLAIN = ConversionOptions(reduction=0.5)  # partial_rope=high, low_rank=joint: looks at no text
TEXT = list(tokens(8, 24, seed=1).split(2))
DOWN = "model.layers.1.mlp.down_proj"


def changed(change: Callable[[PreTrainedModel], Any], family: str = "llama", **sizes: object) -> PreTrainedModel:
    model = tiny_model(family, tie_word_embeddings=False, **sizes)
    with torch.no_grad():
        change(model)
    return model


def of(model: nn.Module, *parts: str) -> list[torch.Tensor]:
    found = [each.data for name, each in model.named_parameters() if any(part in name for part in parts)]
    assert found
    return found


def overflowing(model: PreTrainedModel) -> None:
    """The activations of layer 1 go beyond float16, its weights do not."""
    of(model, "layers.1.mlp.up_proj")[0].mul_(1000)
    of(model, "layers.1.mlp.down_proj")[0].mul_(1000)
    model.half()


def test_largest_sees_every_number() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        numbers = torch.full((3, 5), -2.0, dtype=dtype)
        assert largest(numbers) == 2 and is_finite(numbers)
        for odd in (float("nan"), float("inf"), -float("inf")):
            numbers[1, 3] = odd
            assert not is_finite(numbers)
    assert is_finite(torch.empty(0)) and is_finite(torch.arange(3))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e20])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", f"{DOWN}.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_are_named_before_anything_runs(
    name: str, odd: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = changed(lambda model: model.get_parameter(name).view(-1)[3].fill_(odd))
    model.save_pretrained(tmp_path / "original")

    def runs(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    message = f"the original's weights hold NaN, infinity or numbers beyond 1e.18 in {name}; the checkpoint is broken"
    for options in (BEST, PLAIN):
        with pytest.raises(ValueError, match=message):
            convert_streamed(tmp_path / "original", tmp_path / "out", options, TEXT, TEXT)
    assert not list((tmp_path / "out").glob("model*"))
    monkeypatch.setattr(type(model.model.layers[0]), "forward", runs)
    with pytest.raises(ValueError, match=message):
        collect_statistics(model, TEXT)
    with pytest.raises(ValueError, match=message):
        convert(model, PLAIN)


def test_of_many_broken_weights_a_few_are_named() -> None:
    model = changed(lambda model: [weight.fill_(float("nan")) for weight in of(model, "mlp")])
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.weight and 3 more; the checkpoint is broken"):
        convert(model, PLAIN)


def test_weights_that_float16_cannot_hold_ask_for_another_dtype() -> None:
    model = changed(lambda model: of(model, "up_proj")[0].mul_(1e6)).half()
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj.weight; float16 ends at 65,504: take bfloat16"):
        convert(model, PLAIN)


def test_an_overflow_in_float16_names_module_and_remedy_and_bfloat16_converts(tmp_path: Path) -> None:
    model = changed(overflowing)
    message = f"the original's own activations are not finite in float16, first in the output of {DOWN}; float16 ends"
    with pytest.raises(ValueError, match=message):
        collect_statistics(model, TEXT)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=message.replace("output of model.", "output of ")):
        reconstruct(model, convert(model, PLAIN)[0], TEXT, steps=1)
    with pytest.raises(ValueError, match=message):
        compare(model, convert(model, PLAIN)[0], TEXT)
    model.save_pretrained(tmp_path / "original")
    for calibration, heldout in ((TEXT, []), ([], TEXT)):
        with pytest.raises(ValueError, match=message.replace("output of model.", "output of ")):
            convert_streamed(tmp_path / "original", tmp_path / "out", PLAIN, calibration, heldout)
    model.bfloat16()
    converted, _ = convert(model, BEST, collect_statistics(model, TEXT))
    assert compare(model, converted, TEXT).perplexity_converted < 1e6


@pytest.mark.parametrize("place", ["model.norm", "lm_head"])
def test_what_overflows_behind_the_last_layer_is_found_too(place: str, tmp_path: Path) -> None:
    model = changed(lambda model: of(model, place)[0].mul_(20000)).half()
    converted, _ = convert(model, PLAIN)
    with pytest.raises(ValueError, match=f"the original's own activations are not finite in float16, .* of {place}"):
        compare(model, converted, TEXT)
    model.save_pretrained(tmp_path / "original")
    with pytest.raises(ValueError, match="logits of the original are not finite on the held-out text"):
        convert_streamed(tmp_path / "original", tmp_path / "out", PLAIN, [], TEXT)


def test_only_the_converted_model_breaks() -> None:
    model = tiny_model()
    converted, _ = convert(model, PLAIN)
    of(converted, "layers.1.self_attn.o_proj")[0].fill_(float("nan"))
    with pytest.raises(ValueError, match="the converted model's activations .* of model.layers.1.self_attn.o_proj"):
        compare(model, converted, TEXT)
    with pytest.raises(ValueError, match="the converted model's activations .* of layers.1.self_attn.o_proj"):
        reconstruct(model, converted, TEXT, steps=0)
    of(converted, "layers.0.self_attn.kv_a_proj")[0].fill_(float("nan"))
    with pytest.raises(ValueError, match="latents are not finite on the calibration text"):
        calibrate_ranges(converted, TEXT, 4, None)


def test_padding_may_be_what_it_will() -> None:
    model, ids = tiny_model(), tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0

    def spoil(_module: object, _inputs: object, states: torch.Tensor) -> torch.Tensor:
        return torch.where(mask[..., None].bool(), states, float("nan"))

    handle = model.model.norm.register_forward_hook(spoil)
    collect_statistics(model, [{"input_ids": ids, "attention_mask": mask}])
    handle.remove()


def test_activations_whose_squares_overflow_are_refused_with_their_layer(tmp_path: Path) -> None:
    model = changed(lambda model: of(model, "layers.1.self_attn.k_proj")[0].zero_())  # or scores would overflow
    of(model, "layers.1.self_attn.q_proj")[0].mul_(1e12)
    of(model, "layers.1.input_layernorm")[0].mul_(1e9)
    message = "activations in layer 1's attention are finite but too large to square in float32"
    with pytest.raises(ValueError, match=message):
        collect_statistics(model, TEXT)
    model.save_pretrained(tmp_path / "original")
    with pytest.raises(ValueError, match=message):
        convert_streamed(tmp_path / "original", tmp_path / "out", BEST, TEXT, [])


DEAD = {
    "everything": [""],
    "queries": ["q_proj"],
    "keys": ["k_proj"],
    "values": ["v_proj"],
    "output": ["o_proj"],  # a block that was put in to be trained (LLaMA Pro)
    "inputs": ["layers.0.input_layernorm"],
    "block": ["layers.0."],
    "embedding": ["embed_tokens"],
}
METHODS = {
    "best": BEST,
    "plain": PLAIN,
    "care": ConversionOptions(**preset("best"), reduction=0.5, rank_allocation="care"),
    "energy": ConversionOptions(**preset("best"), reduction=0.5, rank_allocation="energy"),
    "queries": ConversionOptions(**preset("best"), reduction=0.5, q_lora_rank=12),
    "split": ConversionOptions(partial_rope="2-norm", low_rank="split", reduction=0.5),
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dead", DEAD)
def test_zeros_convert_into_numbers_with_every_method(dead: str, family: str) -> None:
    model = changed(lambda model: [weight.zero_() for weight in of(model, *DEAD[dead])], family)
    statistics = collect_statistics(model, TEXT)
    for options in METHODS.values():
        converted, report = convert(model, options, statistics)
        found = compare(model, converted, TEXT[:1])
        json.dumps(report.to_dict() | {"comparison": vars(found)}, allow_nan=False)
        assert all(map(is_finite, converted.state_dict().values()))
    geometry = geometry_of(model.config)
    rope = geometry.rotary_size
    full = ConversionOptions(**preset("best"), rope_dim=rope, kv_lora_rank=geometry.full_rank(rope))
    assert compare(model, convert(model, full, statistics)[0], TEXT[:1]).kl_divergence < 1e-5


@pytest.mark.parametrize("dead", ["everything", "output", "values"])
def test_layers_that_give_nothing_have_nothing_to_be_fitted_on(dead: str, tmp_path: Path) -> None:
    model = changed(lambda model: [weight.zero_() for weight in of(model, *DEAD[dead])])
    model.save_pretrained(tmp_path / "original")
    converted, _ = convert(model, BEST, collect_statistics(model, TEXT))
    fits = reconstruct(model, converted, TEXT, steps=3)
    streamed = convert_streamed(tmp_path / "original", tmp_path / "out", BEST, TEXT, TEXT[:1], steps=3)
    assert [vars(fit) for fit in fits] == [vars(fit) for fit in streamed.fits]
    assert all(fit.before == fit.after == 0 for fit in fits)
    assert compare(model, converted, TEXT[:1]).kl_divergence < 1e-6
    assert streamed.comparison is not None and streamed.comparison.kl_divergence < 1e-6


def test_inputs_that_calibration_never_showed_are_not_factored_away() -> None:
    """Layer 0 sees only zeros on calibration text; on another token it must give what the original gives."""
    model = changed(lambda model: of(model, "embed_tokens")[0][:90].zero_())
    geometry = geometry_of(model.config)
    rope = geometry.rotary_size
    full = ConversionOptions(**preset("best"), rope_dim=rope, kv_lora_rank=geometry.full_rank(rope))
    seen, unseen = torch.randint(3, 90, (2, 24)), torch.randint(90, 96, (2, 24))
    converted, _ = convert(model, full, collect_statistics(model, [seen]))
    assert compare(model, converted, [unseen]).kl_divergence < 1e-5


def test_a_token_without_states_counts_nothing_in_reconstruction() -> None:
    model = changed(lambda model: of(model, "embed_tokens")[0][int(TEXT[0][0, 5])].zero_())
    converted, _ = convert(model, BEST, collect_statistics(model, TEXT))
    fits = reconstruct(model, converted, TEXT, steps=3)
    assert all(0 <= fit.after < 10 for fit in fits) and all(map(is_finite, converted.state_dict().values()))


@pytest.mark.parametrize("theta", [0.0, -10.0, float("nan")])
def test_a_rotation_without_numbers_is_refused(theta: float) -> None:
    model = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": theta})
    with pytest.raises(ValueError, match="rotary frequencies are not finite with rope_parameters=.*rope_theta"):
        convert(model, PLAIN)
    with pytest.raises(ValueError, match="a context of 0 tokens"):
        rotation_loss(torch.ones(2), 0)


def test_a_norm_without_epsilon_is_one() -> None:
    model = tiny_model("qwen3", rms_norm_eps=0.0)
    norms = read_norms(attention_layers(model)[0], geometry_of(model.config))
    assert norms is not None and norms.eps == 0
    converted, _ = convert(model, BEST, collect_statistics(model, TEXT))
    assert converted.config.qk_norm_eps == 0 and compare(model, converted, TEXT).kl_divergence < 10


def test_the_first_module_is_told_apart_from_those_that_hand_on() -> None:
    model = tiny_model()
    assert first_not_finite(model, lambda: model(TEXT[0])) == ""
    of(model, "layers.0.mlp.gate_proj")[0].fill_(float("nan"))
    assert first_not_finite(model, lambda: model(TEXT[0])) == "model.layers.0.mlp.gate_proj"
    states = embed(model.model, TEXT[0])
    with pytest.raises(ValueError, match="layers.0.mlp.gate_proj"):
        pass_layer(model.model, 0, states)


def test_scores_may_be_minus_infinity_and_nothing_else() -> None:
    ids, scores = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 7)
    scores[:, 1:] = -float("inf")
    assert FiniteScores()(ids, scores) is scores
    for odd in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="logits are not finite after 5 tokens"):
            FiniteScores()(ids, scores.index_fill(1, torch.tensor([0]), odd))

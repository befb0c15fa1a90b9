"""Exports are the same function under other names: DeepSeek's own class, and the form that vLLM recognises."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from mha2mla import ConversionOptions, QuantizedLatentCache, cache_bytes, collect_statistics, convert, native, served
from mha2mla.native import to_deepseek
from mha2mla.served import to_served
from tests.tiny import FAMILIES, KV_HEADS, preset, relative, tiny_model, tokens

TOLERANCE = 1e-5  # 3e-6 is measured
GRID = preset("best") | {"partial_rope": "evenly-spaced", "rope_dim": 4, "kv_lora_rank": 12}
NATIVE = {"llama", "mistral", "phi3", "granite"}
SERVED = NATIVE | {"qwen2", "smollm3", "mixtral"}


def converted(family: str = "llama", heads: str = "gqa", **changes: object) -> torch.nn.Module:
    options = {**GRID, **changes}
    if family in ("qwen3", "gemma3_text", "qwen3_moe"):
        options["partial_rope"] = "rotation-cost"
    model = tiny_model(family, KV_HEADS[heads])
    return convert(model, ConversionOptions(**options), collect_statistics(model, [tokens(8, 24, seed=1)]))[0]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(tokens(), use_cache=False).logits


@pytest.mark.capability("native export")
@pytest.mark.parametrize("heads", KV_HEADS)
@pytest.mark.parametrize("family", sorted(NATIVE))
def test_deepseeks_own_class_gives_the_same_logits(family: str, heads: str, tmp_path: Path) -> None:
    model = converted(family, heads)
    to_deepseek(model).save_pretrained(tmp_path)
    loaded, found = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert relative(logits(loaded), logits(model)) < TOLERANCE
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    assert torch.equal(loaded.generate(tokens(), **options), model.generate(tokens(), **options))
    with torch.no_grad():
        caches = [each(tokens(), use_cache=True).past_key_values for each in (loaded, model)]
    assert cache_bytes(caches[0]) == cache_bytes(caches[1])


def test_native_export_of_factored_queries_and_of_half_precision() -> None:
    model = converted(q_lora_rank=20)
    assert relative(logits(to_deepseek(model)), logits(model)) < TOLERANCE
    for export in (to_deepseek, to_served):
        half = export(converted().bfloat16())
        assert half.dtype == torch.bfloat16 and relative(logits(half).float(), logits(converted())) < 0.1


def test_float16_and_coded_caches_of_serving_forms_are_refused() -> None:
    model = converted()
    with pytest.raises(ValueError, match="a model's serving form expands latents itself"):
        QuantizedLatentCache(to_served(model).config)
    model.half()
    for export in (to_deepseek, to_served):
        with pytest.raises(ValueError, match="in float16: .* use bfloat16"):
            export(model)


@pytest.mark.parametrize("part", ["SHRINK", "interleaved", "attention_state"])
def test_every_step_of_the_native_export_counts(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: without the small latents, the order of pairs or the factor on queries it is another function."""
    model = converted()
    own = native.attention_state

    def without_scale(attention: object, branch: float) -> dict[str, torch.Tensor]:
        state = own(attention, branch)
        return state | {"q_proj.weight": state["q_proj.weight"] / 1.5}

    spoiled = {"SHRINK": 1.0, "interleaved": lambda rows, order: rows, "attention_state": without_scale}[part]
    monkeypatch.setattr(native, part, spoiled)
    assert relative(logits(to_deepseek(model)), logits(model)) > 1e-2


@pytest.mark.capability("native export", "refused")
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NATIVE))
def test_what_deepseeks_layout_cannot_say_is_refused_by_name(family: str) -> None:
    with pytest.raises(ValueError, match=f"no native export of this {family}_mla model: it has [a-z]"):
        to_deepseek(converted(family, "mha"))


def test_frequencies_off_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="not every n-th; convert with partial_rope=evenly-spaced"):
        to_deepseek(converted(partial_rope="rotation-cost", rope_dim=6))
    with pytest.raises(ValueError, match="a rotated key for every key head"):
        to_deepseek(converted(partial_rope="high", rope_basis="heads", low_rank="joint", expected_rotation=False))
    scaled = tiny_model(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    with pytest.raises(ValueError, match="rope_type=linear, which engines read as another"):
        to_deepseek(convert(scaled, ConversionOptions(**GRID), collect_statistics(scaled, [tokens()]))[0])


@pytest.mark.capability("vLLM form")
@pytest.mark.parametrize("family", sorted(SERVED))
def test_the_serving_form_is_the_same_function(family: str, tmp_path: Path) -> None:
    model = converted(family, partial_rope="rotation-cost", rope_dim=6, q_lora_rank=20)
    to_served(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    attention = loaded.model.layers[0].self_attn
    assert type(attention).__name__ == "ServedMLAAttention" and loaded.config.auto_map["AutoModel"]
    assert relative(logits(loaded), logits(model)) < TOLERANCE
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    assert torch.equal(loaded.generate(tokens(), **options), model.generate(tokens(), **options))
    attention.kv_a_layernorm.variance_epsilon = 1e-6  # control: as a real norm it changes the latent
    assert relative(logits(loaded), logits(model)) > 1e-2


@pytest.mark.capability("vLLM form", "refused")
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - SERVED))
def test_what_an_engine_s_cache_cannot_hold_is_refused_by_name(family: str) -> None:
    with pytest.raises(ValueError, match=f"no serving form of this {family}_mla model: it has [a-z]"):
        to_served(converted(family, "mha"))
    assert not served.obstacles(converted("llama").config)

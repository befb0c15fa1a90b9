"""Bad options end in one error that says what was given, what is allowed and what to do."""

import re

import pytest
from transformers import AutoConfig, LlamaConfig

from mha2mla import ConversionOptions, collect_statistics, convert, resolve_options
from mha2mla.options import Geometry
from tests.tiny import tiny_model

SMOLLM = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_dim": 25}, "rope_dim=25 .*multiple of 6, for example 24"),
        ({"rope_dim": 20}, "rope_dim=20 .*multiple of 6, for example 18"),
        ({"rope_dim": 198}, r"rope_dim=198 is outside 2\.\.192"),
        ({"rope_dim": 0}, "rope_dim=0 is outside"),
        ({"rope_dim": 24, "kv_lora_rank": 361}, r"kv_lora_rank=361 .*outside 1\.\.360"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0"),
        ({"kv_lora_rank": 96, "reduction": 0.5}, "give one of them"),
        ({"reduction": 0.99}, "which rope_dim=24 alone uses up"),
        ({"low_rank": "split", "kv_lora_rank": 95}, "must be even"),
        ({"low_rank": "magic"}, "low_rank='magic' is unknown; choose one of: joint, activation"),
        ({"partial_rope": "3-norm"}, "choose one of: high, low, uniform, 2-norm"),
        ({"partial_rope": "uniform", "rope_dim": 18}, "3 kept pairs a head .*do not divide its 32"),
        ({"q_lora_rank": 577}, r"q_lora_rank=577 is outside 1\.\.576"),
    ],
)
def test_sizes_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_options(SMOLLM, ConversionOptions(**options))


def test_defaults_are_the_papers_first_setting() -> None:
    resolved = resolve_options(SMOLLM, ConversionOptions())
    assert (resolved.rope_dim, resolved.kv_lora_rank) == (24, 96)


@pytest.mark.parametrize(
    ("reduction", "sizes"), [(0.5, (48, 144)), (0.6875, (24, 96)), (0.8125, (24, 48)), (0.875, (16, 32))]
)
def test_rotation_gets_a_quarter_to_a_third_of_the_budget(reduction: float, sizes: tuple[int, int]) -> None:
    options = ConversionOptions(reduction=reduction, partial_rope="rotation-cost", rope_basis="principal")
    resolved = resolve_options(SMOLLM, options)
    assert (resolved.rope_dim, resolved.kv_lora_rank) == sizes


@pytest.mark.parametrize(("reduction", "rank"), [(0.6875, 96), (0.8125, 48), (0.875, 24)])
def test_reduction_gives_the_papers_ranks(reduction: float, rank: int) -> None:
    assert resolve_options(SMOLLM, ConversionOptions(reduction=reduction)).kv_lora_rank == rank


def test_full_rank_of_multi_head_attention_is_bounded_by_the_hidden_size() -> None:
    geometry = Geometry(hidden_size=32, num_heads=4, num_kv_heads=4, head_dim=8)
    assert geometry.full_rank(8) == 32 and geometry.full_rank(8, "split") == 24 + 32


REFUSED = {
    "'gpt2' is not supported; supported are: gemma2, gemma3_text, gpt_neox, granite, llama,": ("gpt2", {}),
    "'t5' is an encoder-decoder": ("t5", {}),
    "'bert' is an encoder,": ("bert", {"architectures": ["BertForMaskedLM"]}),
    "'mamba' has no attention": ("mamba", {}),
    "'jamba' mixes attention with layers of another kind": ("jamba", {}),
    "'deepseek_v3' has latent attention of its own": ("deepseek_v3", {}),
    "'gemma3' wraps a gemma3_text language model": ("gemma3", {}),
    "weights are quantised (bitsandbytes)": ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    "weights are quantised (gptq)": ("qwen2", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    "clip_qkv=8": ("olmoe", {"clip_qkv": 8.0}),
    "attention_bias=True: biases under norms": ("qwen3", {"attention_bias": True}),
    "frequency_folding=2 mixes frequencies, which": ("qwen3", {}),
    "evenly-spaced needs rope_basis=principal, which qwen3_moe": ("qwen3_moe", {}),
}
OPTIONS = {
    "qwen3": {"frequency_folding": 2, "rope_basis": "principal", "partial_rope": "rotation-cost"},
    "qwen3_moe": {"partial_rope": "evenly-spaced", "rope_basis": "principal"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(message: str) -> None:
    model_type, changes = REFUSED[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_options(
            AutoConfig.for_model(model_type, **changes),
            ConversionOptions(**({} if changes else OPTIONS.get(model_type, {}))),
        )


def test_converted_model_is_refused() -> None:
    converted, _ = convert(tiny_model(), ConversionOptions(kv_lora_rank=8))
    with pytest.raises(ValueError, match="converted already"):
        convert(converted, ConversionOptions(kv_lora_rank=8))


def test_strategy_that_needs_calibration_says_so() -> None:
    with pytest.raises(ValueError, match="calibration=collect_statistics"):
        convert(tiny_model(), ConversionOptions(kv_lora_rank=8, partial_rope="2-norm"))


def test_empty_calibration_is_an_error() -> None:
    with pytest.raises(ValueError, match="calibration text is empty"):
        collect_statistics(tiny_model(), [])

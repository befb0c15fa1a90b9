"""Streamed statistics equal those of all activations at once, whatever the batches; padding is not counted."""

import pytest
import torch

from mha2mla import ConversionOptions, calibrate_ranges, collect_statistics, convert, reconstruct
from mha2mla.compare import compare
from tests.tiny import relative, tiny_model, tokens


def test_stream_equals_all_at_once() -> None:
    model, ids = tiny_model("qwen2"), tokens(6, 16)
    with torch.no_grad():
        hidden = model.model(ids, output_hidden_states=True).hidden_states[1]
        layer = model.model.layers[1]
        x = layer.input_layernorm(hidden).flatten(0, 1)
        moment = x.T @ x / len(x)
        query = layer.self_attn.q_proj(x).view(-1, 4, 2, 4).norm(dim=2).mean(0)
        key = layer.self_attn.k_proj(x).view(-1, 2, 2, 4).norm(dim=2).mean(0)
    for size in (6, 2, 1):
        statistics = collect_statistics(model, ids.split(size))
        assert statistics.tokens == ids.numel()
        assert relative(statistics.layers[1].input_moment, moment) < 1e-5
        assert relative(statistics.layers[1].query_norm, query) < 1e-5
        assert relative(statistics.layers[1].key_norm, key) < 1e-5


def test_padding_is_not_counted() -> None:
    model, ids = tiny_model(), tokens(2, 16)
    padded = torch.cat((ids, torch.zeros_like(ids)), dim=1)
    mask = torch.cat((torch.ones_like(ids), torch.zeros_like(ids)), dim=1)
    plain = collect_statistics(model, [ids])
    masked = collect_statistics(model, [{"input_ids": padded, "attention_mask": mask}])
    blind = collect_statistics(model, [padded])
    assert masked.tokens == plain.tokens
    assert relative(masked.layers[1].input_moment, plain.layers[1].input_moment) < 1e-5
    assert relative(blind.layers[1].input_moment, plain.layers[1].input_moment) > 1e-2


def test_padding_may_be_any_number_and_text_may_not() -> None:
    """Tokenizers pad with tokens that a model does not embed, and add tokens that it does not know."""
    model, ids = tiny_model(), tokens(2, 16)
    options = ConversionOptions(rope_dim=8, kv_lora_rank=8)
    converted, _ = convert(model, options)
    mask = torch.cat((torch.ones_like(ids), torch.zeros_like(ids)), dim=1)
    plain = collect_statistics(model, [ids])
    for pad in (96, 10**6, -1):
        padded = torch.cat((ids, torch.full_like(ids, pad)), dim=1)
        masked = collect_statistics(model, [{"input_ids": padded, "attention_mask": mask}])
        assert relative(masked.layers[1].input_moment, plain.layers[1].input_moment) < 1e-5
        for run in (
            lambda text: collect_statistics(model, [text]),
            lambda text: compare(model, converted, [text]),
            lambda text: reconstruct(model, converted, [text], 1),
            lambda text: calibrate_ranges(converted, [text], 8, 8),
        ):
            with pytest.raises(ValueError, match=rf"token id {pad} is outside 0\.\.95"):
                run(padded)


def test_hooks_are_gone_afterwards() -> None:
    model = tiny_model()
    collect_statistics(model, [tokens()])
    assert not any(module._forward_hooks for module in model.modules())


def test_comparison_of_a_model_with_itself_and_with_a_broken_one() -> None:
    model, broken = tiny_model(), tiny_model(seed=1)
    same = compare(model, model, [tokens()])
    assert same.kl_divergence < 1e-6 and same.top_token_agreement == 1
    assert same.perplexity_original == same.perplexity_converted
    other = compare(model, broken, [tokens()])
    assert other.kl_divergence > 0.1 and other.top_token_agreement < 0.9
    with torch.no_grad():
        logits = model(tokens()).logits[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, tokens()[:, 1:].flatten()).exp()
    assert abs(same.perplexity_original / float(expected) - 1) < 1e-5

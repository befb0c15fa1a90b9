"""KL to the original: 0 for a model itself, the plain computation, and through a cache what the cache gives back."""

import pytest
import torch
from torch.nn import functional

import eval.perplexity as windows_of
from eval.divergence import divergence
from eval.generate import coded_cache
from eval.perplexity import perplexity
from mha2mla import ConversionOptions, convert
from tests.eval.few_bits import few_bits
from tests.eval.test_perplexity import windows
from tests.eval.tiny import model


def plain(original: torch.nn.Module, other: torch.nn.Module, pieces: list[torch.Tensor]) -> tuple[float, float]:
    """Window by window: mean KL and agreement over all predicted tokens."""
    total, agreeing, count = 0.0, 0, 0
    with torch.inference_mode():
        for piece in pieces:
            theirs, ours = (each(input_ids=piece[None]).logits[0, :-1].log_softmax(-1) for each in (original, other))
            total += functional.kl_div(ours, theirs, log_target=True, reduction="sum").item()
            agreeing += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
            count += len(piece) - 1
    return total / count, agreeing / count


def test_a_model_is_at_no_distance_from_itself() -> None:
    tiny = model()
    found = divergence(tiny, tiny, windows(40, 7, 33))
    assert found.kl_divergence == 0 and found.top_token_agreement == 1 and found.tokens == 77
    # A control: another model is far away.
    assert divergence(tiny, model(seed=1), windows(40, 7, 33)).kl_divergence > 0.1


def test_equals_the_plain_computation_however_windows_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    original, pieces, seen = model(), windows(40, 7, 40, 2, 33), []
    other, _ = convert(original, ConversionOptions(rope_dim=8, kv_lora_rank=12))
    expected = plain(original, other, pieces)
    for tokens in (2048, 50):
        monkeypatch.setattr(windows_of, "FORWARD_TOKENS", tokens)
        found = divergence(original, other, pieces, on_tokens=seen.append)
        assert (found.kl_divergence, found.top_token_agreement) == pytest.approx(expected, rel=1e-4)
        assert found.perplexity_converted == pytest.approx(perplexity(other, pieces), rel=1e-5)
        assert found.perplexity_original == pytest.approx(perplexity(original, pieces), rel=1e-5)
    assert sum(seen) == 2 * 122


def test_through_a_quantised_cache_fewer_bits_are_farther_away() -> None:
    tiny, pieces = model(), windows(40, 40, 33)
    found = [divergence(tiny, tiny, pieces, few_bits(bits)).kl_divergence for bits in (8, 4, 2)]
    assert 0 < found[0] < 0.1 * found[1] and found[1] < 0.5 * found[2]
    converted, _ = convert(tiny, ConversionOptions(rope_dim=8, kv_lora_rank=12))
    latent = [divergence(converted, converted, windows(90), coded_cache(bits)) for bits in (8, 2)]
    assert 0 < latent[0].kl_divergence < latent[1].kl_divergence


def test_no_padding_goes_through_a_cache() -> None:
    """Its keys are quantised over the window, which padding would belong to."""
    tiny, pieces = model(), windows(40, 7, 40, 33)
    alone = [divergence(tiny, tiny, [piece], few_bits(2)) for piece in pieces]
    mean = sum(each.kl_divergence * each.tokens for each in alone) / sum(each.tokens for each in alone)
    assert divergence(tiny, tiny, pieces, few_bits(2)).kl_divergence == pytest.approx(mean, rel=1e-4)
    padding = torch.zeros(33, dtype=torch.long)  # a control: with padding it is another number
    [longer] = [torch.cat([pieces[1], padding])]
    with torch.inference_mode():
        logits = [
            tiny(each[None], past_key_values=few_bits(2)(tiny), use_cache=True).logits[0, :7]
            for each in (pieces[1], longer)
        ]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_nothing_to_compare_and_logits_that_are_not_finite_are_errors() -> None:
    tiny = model()
    with pytest.raises(ValueError, match="no text to compare"):
        divergence(tiny, tiny, [])
    broken = model()
    broken.lm_head.weight.data[7, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        divergence(tiny, broken, windows(20))

"""The loss of every token, for every family and its conversion, against the plain loss over the model's own logits."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache, PreTrainedModel

from eval import positions
from eval.cache_bits import decoding_perplexity
from eval.perplexity import perplexity
from mha2mla import ConversionOptions, convert, output_head
from mha2mla.compare import compare
from mha2mla.families import FAMILIES
from mha2mla.output_head import IGNORED, ask, logits_from, next_token_losses, perplexity_of, runs_apart, token_losses
from tests.tiny import tiny_model, tokens

# What families do behind the head, switched on and large enough to matter.
BEHIND = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 8.0},
}
MLA = ConversionOptions(rope_dim=8, kv_lora_rank=10)


def made(family: str, which: str) -> PreTrainedModel:
    model = tiny_model(family, **BEHIND.get(family, {}))
    return model if which == "original" else convert(model, MLA)[0].eval()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 9 rows: several of them, a last one that is not full, and fewer rows than any text here has."""
    monkeypatch.setattr(output_head, "ROWS", {"cpu": 9})
    monkeypatch.setattr(positions, "native_autocast", lambda device: torch.autocast(device, enabled=False))


def plain(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[B, T - 1] from the model's own logits of everything at once."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(
        len(ids), -1
    )


@pytest.mark.parametrize("which", ["original", "converted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_models_own_logits(family: str, which: str) -> None:
    model, ids = made(family, which), tokens()
    expected, before = plain(model, ids), list(model.named_modules())
    assert runs_apart(model)
    found = next_token_losses(model, ids)
    assert torch.allclose(found[:, :-1], expected, rtol=1e-5, atol=1e-5)
    assert not found[:, -1].any()
    assert list(model.named_modules()) == before  # the decoder is back in its place

    # Everything that is measured in nats is a sum of these.
    mean = math.exp(float(expected.double().mean()))
    assert perplexity(model, list(ids)) == pytest.approx(mean, rel=1e-5)
    by_position = torch.stack([positions.losses(model, row) for row in ids])
    assert torch.allclose(by_position.float(), expected, rtol=1e-5, atol=1e-5)
    assert decoding_perplexity(model, ids, DynamicCache(config=model.config)) == pytest.approx(mean, rel=1e-4)
    comparison = compare(model, model, [ids])
    assert comparison.perplexity_original == comparison.perplexity_converted == pytest.approx(mean, rel=1e-5)
    assert comparison.tokens == expected.numel() and abs(comparison.kl_divergence) < 1e-6


@pytest.mark.parametrize("family", BEHIND)
def test_the_head_alone_is_another_number(family: str) -> None:
    """Control: without what the family does behind its head the losses differ by far more than the tests allow."""
    model, ids = made(family, "original"), tokens()
    with torch.no_grad():
        logits = model.get_output_embeddings()(model.base_model(ids, use_cache=False).last_hidden_state)
    alone = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(alone) / float(plain(model, ids).mean()) - 1) > 0.1


def test_an_end_that_no_setting_tells_of_is_measured_too() -> None:
    """A factor in the code of a class alone, as a family of tomorrow may have it."""
    model, ids = tiny_model(), tokens()
    before, forward = plain(model, ids), type(model).forward

    class Louder(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **inputs: object) -> object:
            output = forward(self, *args, **inputs)
            output.logits = 3 * output.logits
            return output

    model.__class__ = Louder
    assert torch.allclose(next_token_losses(model, ids)[:, :-1], plain(model, ids), rtol=1e-5, atol=1e-5)
    assert abs(float(plain(model, ids).mean() / before.mean()) - 1) > 0.1


def test_a_family_that_is_not_known_and_a_wrapped_forward_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_head, "logits_from", None)  # calling it would fail
    torch.manual_seed(0)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=2)).eval()
    wrapped = tiny_model()
    wrapped.forward = wrapped.forward
    for model in (bloom, wrapped):
        assert not runs_apart(model)
        assert torch.allclose(next_token_losses(model, tokens())[:, :-1], plain(model, tokens()), atol=1e-5)


def test_labels_and_positions_are_those_given() -> None:
    """Two documents in one row: the second begins at position 0 and is predicted from nothing of the first."""
    model, ids = tiny_model(), tokens()
    packed = ids.view(1, -1)
    positions = torch.arange(24).repeat(2)[None]
    labels = functional.pad(packed[:, 1:], (0, 1), value=IGNORED)
    labels[0, 23] = IGNORED
    found = next_token_losses(model, packed, labels, position_ids=positions)
    assert torch.allclose(found.view(2, 24)[:, :-1], plain(model, ids), atol=1e-5)
    assert found[0, 23] == found[0, 47] == 0
    assert abs(float(next_token_losses(model, packed)[0, 24:47].mean() / found[0, 24:47].mean()) - 1) > 1e-3


def test_few_logits_stand_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model(), []
    model.get_output_embeddings().register_forward_hook(lambda module, given, found: rows.append(found.numel() // 96))
    labels = torch.full((2, 24), IGNORED)
    labels[:, 3:14] = 5
    next_token_losses(model, tokens(), labels)
    assert rows == [9, 9, 4]


def test_an_error_in_a_models_end_leaves_the_model_whole() -> None:
    model = tiny_model()
    with torch.no_grad():
        logits, output = ask(model, tokens())
    with pytest.raises(IndexError):
        logits(torch.tensor([1000]))
    model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_losses(logits_from(model, output), tokens().flatten())
    assert type(model.base_model).__name__ == "LlamaModel"


def test_what_is_too_large_is_infinite_and_what_is_no_number_is_refused() -> None:
    assert perplexity_of(2.0) == math.exp(2.0)
    assert perplexity_of(705.0) == math.exp(705.0)
    assert perplexity_of(1000.0) == perplexity_of(math.inf) == math.inf
    with pytest.raises(ValueError, match="logits are not finite on this text"):
        perplexity_of(math.nan)
    model, ids = tiny_model(), tokens()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    assert perplexity(model, list(ids)) == compare(model, model, [ids]).perplexity_original == math.inf
    assert decoding_perplexity(model, ids, DynamicCache()) == math.inf
    with torch.no_grad():
        model.get_output_embeddings().weight[:, 0] = math.nan
    with pytest.raises(ValueError, match="logits are not finite on this text"):
        perplexity(model, list(ids))

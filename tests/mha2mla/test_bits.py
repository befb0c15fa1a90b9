"""A cache format: bits by what the loss minds, under a budget of bytes, and codes that windows and training see."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from mha2mla import ConversionOptions, collect_statistics, convert, resolve_options
from mha2mla.bits import CHOICES, allocate, choose_format, fit_tables, set_format, turn_latents
from mha2mla.channels import observe
from mha2mla.families import latent_layers
from mha2mla.importance import IMPORTANCE, coarse, energy, fisher, measured, output
from mha2mla.modeling.cache_format_mla import layer_bytes, layer_format
from mha2mla.quantization import fit
from tests.tiny import FAMILIES, tiny_model

SMOLLM = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
BEST: dict[str, Any] = {"partial_rope": "rotation-cost", "rope_basis": "principal", "low_rank": "attention"}


def text(rows: int = 6, length: int = 40) -> list[torch.Tensor]:
    return list(torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1)).split(2))


def converted(family: str = "llama", kv_heads: int = 2, **options: Any) -> Any:
    model = tiny_model(family, kv_heads)
    sizes: dict[str, Any] = {"kv_lora_rank": 16, "rope_dim": 8, "partial_rope": "rotation-cost"}
    chosen = ConversionOptions(**(sizes | options))
    return convert(model, chosen, collect_statistics(model, text()), batches=text())[0]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def away(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_codes_lose_less_with_every_bit() -> None:
    samples = torch.randn(4096, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 2, 5, 10]) + 3
    errors = torch.stack([fit(samples, bits)[2] / samples.var(0) for bits in CHOICES])
    assert (errors[0] - 1).abs().max() < 1e-3
    assert (errors[1:] < errors[:-1]).all()
    assert 0.10 < float(errors[2].mean()) < 0.13  # 0.1188 is what uniform codes of 2 bits lose of a normal


def test_bits_go_where_the_loss_minds_and_fill_bytes() -> None:
    model = converted(kv_lora_rank=24)
    found = observe(model, text())
    weights = fisher(model, found, text())
    chosen = allocate(model, found, 2 * 80, weights)
    for bits, layer, (_, attention) in zip(chosen, found, latent_layers(model), strict=True):
        rank = attention.kv_lora_rank
        for part in (bits[:rank], bits[rank:]):
            for own in set(part):
                assert part.count(own) % 8 == 0, "a run of codes that does not fill bytes"
        assert layer.fisher is not None
        worth = layer.fisher.diagonal() * layer.samples.var(0)
        most, least = (worth[:rank][[own == wanted for own in bits[:rank]]] for wanted in (max(bits), min(bits[:rank])))
        assert most.mean() > least.mean()
        first, second = torch.tensor(bits[rank:]).view(attention.num_rope_heads, 2, -1).unbind(1)
        assert torch.equal(first, second), "rotation mixes a pair's numbers: both need the same bits"
    assert 0 < sum(map(sum, chosen)) <= 160
    with pytest.raises(ValueError, match="leaves no channel a bit"):
        allocate(model, found, 0.5, weights)


@pytest.mark.parametrize("rule", IMPORTANCE)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_every_rule_shares_out_the_budget(family: str, rule: str) -> None:
    model = converted(family, bits="auto", reduction=0.7, kv_lora_rank=24, importance=rule)
    chosen = [layer_format(model.config, index).bits for index in range(2)]
    numbers = 2 * 64  # of the original's cache, a token
    assert 0.4 < sum(map(sum, chosen)) / (0.3 * 16 * numbers) <= 1


def test_output_is_what_the_layer_itself_minds() -> None:
    """A channel that its projection ignores counts nothing; what comes behind the layer changes no weight."""
    model = converted()
    attention = latent_layers(model)[1][1]
    with torch.no_grad():
        attention.kv_b_proj.weight[:, 3] = 0
    found = observe(model, text())
    weights = output(model, found, text())[1]
    assert weights[3] == 0 < weights[4] and energy(model, found, text())[1][3] == 1
    model.model.norm.weight.data *= 7
    assert torch.equal(output(model, found, text())[1], weights)
    assert not torch.allclose(fisher(model, observe(model, text()), text())[1][4:8], found[1].fisher.diagonal()[4:8])


def test_measured_weights_say_what_coarse_codes_really_cost() -> None:
    model = converted()
    found, rows = observe(model, text()), [row for batch in text() for row in batch.split(1)]
    before = [logits(model, row)[0, :-1].log_softmax(-1) for row in rows]
    for index, weights in enumerate(measured(model, found, text())):
        attention = latent_layers(model)[index][1]
        with coarse(attention, found[index]) as error:
            after = [logits(model, row)[0, :-1].log_softmax(-1) for row in rows]
        divergences = [(one.exp() * (one - two)).sum(-1).mean() for one, two in zip(before, after, strict=True)]
        assert float((weights * error).sum() / 2) == pytest.approx(float(sum(divergences)) / len(rows), rel=1e-3)
        assert attention.cache_tables is None and float(sum(divergences)) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_basis_of_the_loss_changes_no_output(family: str) -> None:
    model = converted(family)
    before = logits(model, text()[0])
    found = observe(model, text())
    turn_latents(model, found)
    assert away(logits(model, text()[0]), before) < 2e-4
    again = observe(model, text())
    for ours, theirs in zip(found, again, strict=True):  # what was seen is turned with them
        assert away(ours.samples, theirs.samples) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_come_back_from_codes(family: str) -> None:
    """The error falls with every bit, eight lose next to nothing, and one swapped table is seen."""
    model = converted(family)
    ids = text()[0]
    whole, errors = logits(model, ids), []
    for bits in (1, 2, 4, 8):
        choose_format(model, text(), bits=bits, turn=False)
        errors.append(away(logits(model, ids), whole))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1, errors  # experts change with little
    tables = latent_layers(model)[0][1].cache_tables
    with torch.no_grad():
        tables.minimum[[0, 1]] = tables.minimum[[1, 0]] + 1
    assert away(logits(model, ids), whole) > 2 * errors[-1]


def test_first_tokens_stay_unquantised_wherever_a_text_begins() -> None:
    """Two texts in one row, told apart by their positions, as training packs them."""
    model = converted()
    choose_format(model, text(), bits=1, turn=False)
    attention = latent_layers(model)[0][1]
    states = torch.randn(1, 1, 12, 24) * 50
    positions = torch.arange(6).repeat(2)[None]
    kept = (attention.cache_tables(states, positions) == states).all(-1)[0, 0]
    assert kept.tolist() == [place < 4 for place in positions[0].tolist()]
    alone = attention.cache_tables(states, None)
    assert (alone[:, :, :4] == states[:, :, :4]).all() and (alone[:, :, 4:] != states[:, :, 4:]).any(-1).all()


def test_gradients_pass_straight_through_and_channels_without_bits_get_none() -> None:
    model = converted()
    found = observe(model, text())
    set_format(model, [[0] * 8 + [2] * 8 + [3] * 8 for _ in found])
    fit_tables(model, found)
    model.train()
    model(text()[0], labels=text()[0]).loss.backward()
    attention = latent_layers(model)[0][1]
    states = torch.randn(1, 1, 9, 24, requires_grad=True)
    attention.cache_tables(states, None).square().sum().backward()
    assert states.grad is not None
    beyond = states.grad[0, 0, 4:]
    assert (beyond[:, :8] == 0).all() and (beyond[:, 8:] != 0).any(0).all()
    assert attention.cache_tables.scale.grad[8:].abs().sum() > 0
    assert attention.kv_a_proj_with_mqa.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scales", ["table", "token"])
def test_factors_of_tokens_help_where_sizes_differ(scales: str) -> None:
    model = converted()
    found = observe(model, text())
    set_format(model, [[4] * 24 for _ in found], scales)
    fit_tables(model, found)
    tables = latent_layers(model)[0][1].cache_tables
    states = found[0].samples[None, None, :20] * torch.linspace(0.2, 8, 20)[:, None]  # far beyond what was seen
    error = float((tables(states, None).detach() - states)[:, :, 4:].norm() / states[:, :, 4:].norm())
    assert (error < 0.15) == (scales == "token"), error


@pytest.mark.parametrize("reduction", [0.75, 0.875, 0.9219, 0.9375, 0.9531, 0.9688])
def test_a_reduction_is_in_bytes_with_everything_counted(reduction: float) -> None:
    model = tiny_model(hidden_size=96, head_dim=24)
    options = ConversionOptions(reduction=reduction, bits="auto", context=4096, **BEST)
    made, report = convert(model, options, collect_statistics(model, text()), batches=text())
    forms = [form for index in range(2) if (form := layer_format(made.config, index)) is not None]
    held = sum(layer_bytes(form, 0, 4096) for form in forms)
    assert held <= (1 - reduction) * 2 * 4096 * 2 * 96
    assert report.reduction == pytest.approx(1 - held / (2 * 4096 * 2 * 96))
    assert report.reduction < reduction + 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5 is not possible; choose auto or one of 16, 8"),
        ({"bits": "auto", "reduction": 0.9999}, "leaves nothing for a token's codes"),
        ({"bits": "auto", "context": 4}, "context=4 must be longer"),
        ({"bits": "auto", "importance": "guess"}, "importance='guess' is unknown; choose one of: fisher"),
        ({"bits": 4, "cache_scales": "row"}, "cache_scales='row' is unknown"),
        ({"bits": "auto", "latent_basis": "mine"}, "latent_basis='mine' is unknown"),
        ({"bits": 16, "reduction": 0.99}, "which rope_dim=24 alone uses up"),
    ],
)
def test_formats_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_options(SMOLLM, ConversionOptions(**options))


def test_bits_need_text() -> None:
    model = tiny_model()
    options = ConversionOptions(bits="auto", reduction=0.8, **BEST)
    with pytest.raises(ValueError, match="bits=auto"):
        convert(model, options)
    with pytest.raises(ValueError, match="pass batches"):
        convert(model, options, collect_statistics(model, text()))
    with pytest.raises(ValueError, match="empty"):
        convert(model, options, collect_statistics(model, text()), batches=[])


def test_a_format_has_to_fit_its_layers() -> None:
    model = converted()
    set_format(model, [[4] * 24, [4] * 24])
    model.config.cache_format["bits"][1] = [[4, 23]]
    with pytest.raises(ValueError, match="layer 1 has bits for 23 channels and caches 24"):
        type(model)(model.config)


def test_uniform_bits_are_paid_with_rank() -> None:
    four, two = (resolve_options(SMOLLM, ConversionOptions(bits=bits, reduction=0.9375, **BEST)) for bits in (4, 2))
    sizes = [(each.rope_dim or 0) + (each.kv_lora_rank or 0) for each in (four, two)]
    assert sizes[0] in range(90, 97) and sizes[1] in range(180, 193)

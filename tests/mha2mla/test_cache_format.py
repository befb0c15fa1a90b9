"""The packed cache of a format against windows with simulated codes; padding, beams, bytes, saved models, bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from mha2mla import ConversionOptions, QuantizedLatentCache, cache_bytes, convert
from mha2mla.bits import refit, set_format
from mha2mla.families import latent_layers
from mha2mla.modeling.cache_format_mla import BITS, format_bytes, layer_format
from mha2mla.modeling.packed_states_mla import Meaning, Packed
from mha2mla.modeling.packing_mla import PARTS, Packing, packed_bytes
from mha2mla.modeling.quantized_cache_mla import FormatCache, FormatLayer
from tests.mha2mla.test_checkpoint import block_package
from tests.tiny import FAMILIES, relative, tiny_model, tokens

MIXED = (16, 8, 6, 6, 6, 4, 4, 3, 3, 3, 2, 2, 1, 0)  # numbers of channels that fill no bytes
ROUNDING = 2e-5  # measured: up to 9e-6
SEARCH = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


def formatted(family: str = "llama", scales: str = "table", residual: int = 0, **options: object) -> torch.nn.Module:
    """A converted model with a format of all bits there are, other ones for each channel."""
    model, _ = convert(tiny_model(family), ConversionOptions(**({"rope_dim": 8, "kv_lora_rank": 14} | options)))
    sizes = [layer.kv_lora_rank + layer.rope_dim for _, layer in latent_layers(model)]
    bits = [[MIXED[(3 * place + index) % len(MIXED)] for place in range(size)] for index, size in enumerate(sizes)]
    set_format(model, bits, scales, residual)
    refit(model, [tokens(4, 40, seed=n) for n in range(3)])
    return model


def stepwise(
    model: torch.nn.Module, ids: torch.Tensor, cache: object, prompt: int = 0, **kwargs: object
) -> torch.Tensor:
    """Logits of a prompt in two pieces, then of one token at a time."""
    pieces = [*ids[:, :prompt].split(max(1, prompt - prompt // 3), 1), *ids[:, prompt:].split(1, 1)]
    pieces = [piece for piece in pieces if piece.numel()]
    with torch.no_grad():
        parts = [model(part, past_key_values=cache, **kwargs).logits for part in pieces]
    return torch.cat(parts, 1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of most tokens: a number may lie so near the edge of two codes that rounding decides, and one code
    of the largest step moves all tokens behind it by 1e-3."""
    assert relative(found, expected) < 1e-2
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def window(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("scales", ["table", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_is_one_window_with_simulated_codes(family: str, scales: str) -> None:
    """Control: the table of one channel belongs to another."""
    model, ids = formatted(family, scales), tokens(2, 30)
    expected = window(model, ids)
    cache = FormatCache(model.config)
    assert error(stepwise(model, ids, cache), expected) < ROUNDING
    assert error(stepwise(model, ids, FormatCache(model.config), 15), expected) < ROUNDING
    assert isinstance(cache.layers[0], FormatLayer) and cache.get_seq_length() == 30
    with torch.no_grad():
        tables = latent_layers(model)[0][1].cache_tables
        place = tables.form.bits.index(6)
        tables.minimum[place] += 2 * tables.scale[place] * 63
        wrong = stepwise(model, ids, FormatCache(model.config), 15)
        assert float(((wrong - expected).norm(dim=-1) / expected.norm(dim=-1)).median()) > 1e-3


@pytest.mark.parametrize("scales", ["table", "token"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "smollm3", "olmo2"])
def test_a_padded_row_gives_what_it_gives_alone(family: str, scales: str) -> None:
    """Its first tokens are unquantised wherever they stand. Control: without positions they are those of slot 0."""
    model, ids, padding = formatted(family, scales), tokens(3, 26), (0, 3, 9)
    mask = torch.ones_like(ids)
    for row, length in enumerate(padding):
        mask[row, :length] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for prompt in (12, 26):
        cache, found, wrong = FormatCache(model.config), [], []
        other = FormatCache(model.config)
        with torch.no_grad():
            for tokens_of in [slice(0, prompt), *(slice(n, n + 1) for n in range(prompt, 26))]:
                own = {"input_ids": ids[:, tokens_of], "attention_mask": mask[:, : tokens_of.stop]}
                found.append(model(**own, position_ids=positions[:, tokens_of], past_key_values=cache).logits)
                wrong.append(model(**own, past_key_values=other).logits)
        for row, length in enumerate(padding):
            alone = stepwise(model, ids[row : row + 1, length:], FormatCache(model.config), prompt - length)
            assert error(torch.cat(found, 1)[row, length:], alone[0]) < ROUNDING
            assert (relative(torch.cat(wrong, 1)[row, length:], alone[0]) > 1e-3) == (length > 0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}])
@pytest.mark.parametrize("padding", [0, 5])
def test_generate_makes_its_quantised_cache_unasked(options: dict[str, int], padding: int) -> None:
    """Every way of searching gives what windows with simulated codes give; `dynamic` is unquantised."""
    if padding and "prompt_lookup_num_tokens" in options:
        pytest.skip("transformers looks up in one sequence only")
    model, ids = formatted(), tokens(1 if "prompt_lookup_num_tokens" in options else 2, 16)
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    beams = {"num_beams": options["num_beams"]} if "num_beams" in options else {}
    settings = {"attention_mask": mask, "eos_token_id": None} | SEARCH
    found = model.generate(ids, **settings, **options, return_dict_in_generate=True)
    expected = model.generate(ids, **settings, **beams, use_cache=False)
    assert torch.equal(found.sequences, expected)
    if "use_cache" not in options:
        assert isinstance(found.past_key_values, FormatCache)
        dynamic = model.generate(ids, **settings, cache_implementation="dynamic", return_dict_in_generate=True)
        assert type(dynamic.past_key_values) is DynamicCache


def test_which_cache_forward_makes() -> None:
    model, ids = formatted(), tokens(2, 12)
    with torch.no_grad():
        assert isinstance(model(ids).past_key_values, FormatCache)
        assert isinstance(model.base_model(ids, use_cache=True).past_key_values, FormatCache)
        assert model(ids, use_cache=False).past_key_values is None
        given = DynamicCache()
        unquantised = model(ids, past_key_values=given)
        assert unquantised.past_key_values is given and relative(unquantised.logits, model(ids).logits) > 1e-3
    assert isinstance(model(ids, use_cache=True).past_key_values, FormatCache)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.past_key_values is None
    assert all(own.grad is not None for own in latent_layers(model)[0][1].cache_tables.parameters())
    assert model.train()(ids, use_cache=True).past_key_values is None


@pytest.mark.parametrize("scales", ["table", "token"])
@pytest.mark.parametrize("residual", [0, 5])
@pytest.mark.parametrize("removed", [1, 7, 19, 22])
def test_a_crop_leaves_what_was_before(scales: str, residual: int, removed: int) -> None:
    model, ids = formatted(scales=scales, residual=residual), tokens(2, 22)
    cache = FormatCache(model.config)
    stepwise(model, ids, cache, 16)
    before = [cache.layers[1].states(slot).dense() for slot in (0, 1)]
    cache.crop(-removed)
    assert cache.get_seq_length() == 22 - removed
    for slot in (0, 1):
        assert torch.equal(cache.layers[1].states(slot).dense(), before[slot][:, :, : 22 - removed])
    anew = stepwise(model, ids[:, 22 - removed :], cache)
    if not residual:
        assert error(anew, window(model, ids)[:, 22 - removed :]) < ROUNDING
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


def test_rows_go_along_with_their_batch() -> None:
    model, ids = formatted("qwen3", "token"), tokens(3, 24)
    mask = torch.ones_like(ids)
    mask[1, :6] = mask[2, :2] = 0
    cache, positions = FormatCache(model.config), (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    layer = cache.layers[1]
    before, rows = [layer.states(slot).dense() for slot in (0, 1)], torch.randn(3, 4, 14)
    products = layer.states(0).dot(rows)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 5]))
    for slot in (0, 1):
        assert torch.equal(layer.states(slot).dense(), before[slot][[2, 1]])
    assert relative(layer.states(0).dot(rows[[2, 1]]), products[[2, 1]]) < ROUNDING
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0
    assert error(stepwise(model, ids, cache, 20), window(model, ids)) < ROUNDING


@pytest.mark.parametrize(("family", "scales"), [("llama", "table"), ("qwen3", "token"), ("gemma3_text", "table")])
@pytest.mark.parametrize("residual", [0, 8])
def test_bytes_are_the_format_s(family: str, scales: str, residual: int) -> None:
    options = {"layers": "full-attention"} if family == "gemma3_text" else {}
    model = formatted(family, scales, residual, **options)
    model.config.max_position_embeddings = model.config.sliding_window = 600
    context = 512 + residual
    found = model.generate(
        tokens(1, context - 11), do_sample=False, max_new_tokens=12, eos_token_id=None, return_dict_in_generate=True
    )
    cache = found.past_key_values
    assert cache.get_seq_length() == context
    cache.layers = [layer for layer in cache.layers if isinstance(layer, FormatLayer)]
    assert cache_bytes(cache, number_bytes=2) == format_bytes(model.config, context)
    assert len(cache.layers) == (1 if options else 2)


RELOADED = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.load(sys.argv[2])
torch.set_num_threads(int(sys.argv[4]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "mha2mla" not in sys.modules
found = model.generate(ids, do_sample=False, max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True)
assert type(found.past_key_values).__name__ == "FormatCache"
torch.save(found.sequences, sys.argv[3])
"""


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_saved_model_generates_with_its_cache_with_and_without_the_package(family: str, tmp_path: Path) -> None:
    model = formatted(family).float()
    model.save_pretrained(tmp_path / "saved")
    expected = model.generate(tokens(), **SEARCH)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.generate(tokens(), **SEARCH), expected)
    torch.save(tokens(), tmp_path / "ids.pt")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, "-P", "-c", block_package() + RELOADED, str(tmp_path / "saved")]
    script += [str(tmp_path / "ids.pt"), str(tmp_path / "out.pt"), str(torch.get_num_threads())]
    run = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", ["table", "token"])
@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2"])
def test_half_precision_is_near_float32(family: str, scales: str, dtype: torch.dtype) -> None:
    model, ids = formatted(family, scales), tokens(2, 30)
    expected = window(model, ids)
    model.to(dtype)
    near = relative(window(model, ids).float(), expected)
    assert relative(stepwise(model, ids, FormatCache(model.config), 15).float(), expected) < 1.5 * near + 0.01


@pytest.mark.parametrize("count", [1, 5, 8, 24])
@pytest.mark.parametrize("bits", [*PARTS, None])
def test_codes_come_back_from_bytes(bits: int | None, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    own = [bits] * count if bits else [(0, 1, 2, 3, 4, 6, 8, 16)[n % 8] for n in range(count)]
    levels = torch.tensor([2**b if b < 16 else 1 for b in own])
    codes = (torch.rand(3, 5, count, generator=generator) * levels).to(torch.uint8)
    packed = Packing(own).pack(codes)
    assert packed.shape == (3, packed_bytes(own), 5) and packed.dtype == torch.uint8
    if bits and count % 8 == 0:
        assert packed.shape[1] == bits * count // 8
    assert torch.equal(Packing(own).codes(packed), codes.float())


@pytest.mark.parametrize("scales", ["table", "token"])
def test_products_are_those_with_what_codes_stand_for(scales: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in many. Control: the weights of other tokens."""
    model, ids = formatted(scales=scales), tokens(2, 70)
    cache = FormatCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        layer, rows, weights = cache.layers[0], torch.randn(2, 3, 14), torch.rand(2, 3, 70)
        dense = layer.decode(0)[:, 0]
        for piece in (2**18, 1):
            monkeypatch.setitem(sys.modules[Packed.__module__].PIECE, "cpu", piece)
            assert relative(layer.packed(0).dot(rows), rows @ dense.mT) < ROUNDING
            assert relative(layer.packed(0).mix(weights), weights @ dense) < ROUNDING
            assert relative(layer.packed(0).mix(weights.flip(2)), weights @ dense) > 1e-2
    assert isinstance(layer.packed(0).meaning, Meaning)


def test_bad_input_is_one_line() -> None:
    model = formatted()
    for wanted in ("static", "quantized", "offloaded"):
        with pytest.raises(ValueError, match=f"cache_implementation='{wanted}'.*'dynamic'"):
            model.generate(tokens(), **SEARCH, cache_implementation=wanted)
    plain, _ = convert(tiny_model(), ConversionOptions(rope_dim=8, kv_lora_rank=14))
    with pytest.raises(ValueError, match="no cache format"):
        FormatCache(plain.config)
    with pytest.raises(ValueError, match="no cache format"):
        format_bytes(plain.config, 256)
    with torch.no_grad():
        for other in (plain, formatted(kv_lora_rank=12)):
            with pytest.raises(ValueError, match="layer 0: the cache is of a format of 22 channels"):
                other(tokens(), past_key_values=QuantizedLatentCache(model.config))
    model.config.cache_format["bits"][0][0][0] = 5
    with pytest.raises(ValueError, match="channels of 5 bits"):
        layer_format(model.config, 0)
    assert 5 not in BITS

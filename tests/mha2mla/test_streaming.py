"""Layer by layer gives what the whole model in memory gives, in every family; a killed run goes on to the same bits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from mha2mla import ConversionOptions, collect_statistics, convert, reconstruct
from mha2mla.compare import compare
from mha2mla.shards import write_shard
from mha2mla.streaming import PROGRESS, STATE, convert_streamed
from tests.tiny import FAMILIES, preset, relative, tiny_model, tokens

BEST = ConversionOptions(**preset("best"), reduction=0.5)
TEXT, HELDOUT = list(tokens(8, 24, seed=1).split(2)), list(tokens(4, 24, seed=2).split(2))
STEPS = {"steps": 5, "learning_rate": 3e-3}


def saved(folder: Path, family: str = "llama", **changes: object) -> PreTrainedModel:
    model = tiny_model(family, 4 if family == "gpt_neox" else 2, **changes)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


@pytest.mark.capability("layer by layer")
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_whole(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "original", family)
    found = convert_streamed(tmp_path / "original", tmp_path / "out", BEST, TEXT, HELDOUT, **STEPS)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole, report = convert(model, BEST, collect_statistics(model, TEXT))
    fits = reconstruct(model, whole, TEXT, **STEPS)
    with torch.no_grad():
        assert relative(streamed(tokens()).logits, whole(tokens()).logits) < 2e-4
    assert found.report.cache_size == report.cache_size and found.report.self_check_error < 1e-5
    assert [fit.after for fit in found.fits] == pytest.approx([fit.after for fit in fits], rel=1e-3)
    expected = compare(model, whole, HELDOUT)
    assert found.comparison.perplexity_original == pytest.approx(expected.perplexity_original, rel=1e-4)
    assert found.comparison.kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-3)
    assert not (tmp_path / "out" / STATE).exists()
    assert len(list((tmp_path / "original").glob("*.safetensors"))) > 1


class Killed(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_a_killed_conversion_goes_on_to_the_same_bits(changes: dict, tmp_path: Path) -> None:
    saved(tmp_path / "original", num_hidden_layers=4, **changes)
    arguments = (BEST, TEXT, HELDOUT)
    convert_streamed(tmp_path / "original", tmp_path / "whole", *arguments, **STEPS)

    def kill(index: int, _: object) -> None:
        if index == 1:
            raise Killed

    with pytest.raises(Killed):
        convert_streamed(tmp_path / "original", tmp_path / "out", *arguments, **STEPS, on_layer=kill)
    assert json.loads((tmp_path / "out" / STATE / PROGRESS).read_text())["layers"] == 2
    assert not (tmp_path / "out" / "config.json").exists()  # nothing takes it for finished
    told: list[int] = []
    convert_streamed(
        tmp_path / "original", tmp_path / "out", *arguments, **STEPS, on_layer=lambda index, _: told.append(index)
    )
    assert told == [0, 1, 2, 3]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_another_conversion_does_not_go_on_from_this_one(tmp_path: Path) -> None:
    saved(tmp_path / "original")
    with pytest.raises(Killed):
        convert_streamed(tmp_path / "original", tmp_path / "out", BEST, TEXT, HELDOUT, on_layer=killed_at_once)
    other = ConversionOptions(**preset("best"), reduction=0.75)
    told: list[int] = []
    convert_streamed(
        tmp_path / "original", tmp_path / "out", other, TEXT, HELDOUT, on_layer=lambda i, _: told.append(i)
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.kv_lora_rank == 6


@pytest.mark.parametrize("other", ["source", "text", "layers"])
def test_nothing_of_another_source_or_text_is_kept(other: str, tmp_path: Path) -> None:
    saved(tmp_path / "first", num_hidden_layers=4)
    saved(tmp_path / "second", seed=1, num_hidden_layers=3 if other == "layers" else 4)
    with pytest.raises(Killed):
        convert_streamed(tmp_path / "first", tmp_path / "out", BEST, TEXT, [], on_layer=killed_at_once)
    source = tmp_path / ("first" if other == "text" else "second")
    text = [batch.flip(0) for batch in TEXT] if other == "text" else TEXT
    for output in ("out", "fresh"):
        convert_streamed(source, tmp_path / output, BEST, text, [])
    got, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("out", "fresh"))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("out", "fresh")]
    assert names[0] == names[1]


@pytest.mark.parametrize("family", ["olmo2", "qwen3", "gemma3_text"])
def test_half_precision_with_norms_in_float32_becomes_one_dtype(family: str, tmp_path: Path) -> None:
    model = tiny_model(family).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    model.save_pretrained(tmp_path / "original")
    convert_streamed(tmp_path / "original", tmp_path / "out", BEST, TEXT, HELDOUT, steps=1)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in streamed.parameters()} == {torch.bfloat16}
    assert streamed(tokens()).logits.isfinite().all()


def test_progress_is_kept_until_it_is_forgotten(tmp_path: Path) -> None:
    """Until a stage is sealed: what is done is not done again, and a note without its states is not believed."""
    saved(tmp_path / "original")
    arguments = (tmp_path / "original", tmp_path / "out", BEST, TEXT, [])
    convert_streamed(*arguments, forget=False)
    written = [file.stat().st_mtime_ns for file in sorted((tmp_path / "out").glob("model-*"))]
    convert_streamed(*arguments, forget=False)
    assert [file.stat().st_mtime_ns for file in sorted((tmp_path / "out").glob("model-*"))] == written
    for file in (tmp_path / "out" / STATE).glob("states-*"):
        file.unlink()
    convert_streamed(*arguments)
    assert [file.stat().st_mtime_ns for file in sorted((tmp_path / "out").glob("model-*"))] != written
    assert not (tmp_path / "out" / STATE).exists()


def killed_at_once(*_: object) -> None:
    raise Killed


def test_broken_files_and_options_that_need_all_layers_are_named(tmp_path: Path) -> None:
    saved(tmp_path / "original")
    files = sorted((tmp_path / "original").glob("model-*.safetensors"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=f"{files[1].name} is no complete safetensors file"):
        convert_streamed(tmp_path / "original", tmp_path / "out", BEST, TEXT, [])
    files[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {files[1].name} of its {len(files)} files"):
        convert_streamed(tmp_path / "original", tmp_path / "out", BEST, TEXT, [])
    files[1].write_bytes(whole)
    uneven = ConversionOptions(**preset("best"), reduction=0.5, rank_allocation="energy")
    with pytest.raises(ValueError, match="layer by layer only uniform is possible"):
        convert_streamed(tmp_path / "original", tmp_path / "out", uneven, TEXT, [])
    with pytest.raises(ValueError, match="looks at calibration text; give some"):
        convert_streamed(tmp_path / "original", tmp_path / "out", BEST, [], [])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((tmp_path / "original" / "config.json").read_text())
    with pytest.raises(ValueError, match="holds no safetensors: load that checkpoint and save it again"):
        convert_streamed(tmp_path / "empty", tmp_path / "out", BEST, TEXT, [])
    plain = ConversionOptions(reduction=0.5)
    assert convert_streamed(tmp_path / "original", tmp_path / "plain", plain, [], []).comparison is None


def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("mha2mla.shards.save_file", full)
    with pytest.raises(OSError, match="No space left on device.*make room, and run the same command again"):
        write_shard(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
    assert not list(tmp_path.iterdir())

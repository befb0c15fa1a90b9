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


def killed_at_once(*_: object) -> None:
    raise Killed


def test_broken_files_and_options_that_need_all_layers_are_named(tmp_path: Path) -> None:
    saved(tmp_path / "original")
    files = sorted((tmp_path / "original").glob("model-*.safetensors"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=f"{files[1].name} is no whole safetensors file"):
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

"""Layer by layer gives what the whole model in memory gives, in every family; a killed run goes on to the same bits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mha2mla import ConversionOptions, collect_statistics, convert, reconstruct, to_served
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


FULL = ConversionOptions(rope_dim=16, kv_lora_rank=16, partial_rope="rotation-cost", rope_basis="principal")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a checkpoint of one file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def streamed_logits(folder: Path, output: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Of what transformers loads from a folder and of its exact conversion layer by layer, and the perplexity that the
    conversion says the original has."""
    found = convert_streamed(folder, output, FULL, TEXT, HELDOUT)
    original, converted = (AutoModelForCausalLM.from_pretrained(each, dtype="auto") for each in (folder, output))
    assert original.dtype == converted.dtype
    with torch.no_grad():
        return original(tokens()).logits, converted(tokens()).logits, found.comparison.perplexity_original


def own_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    head = torch.randn(96, 32, generator=torch.Generator().manual_seed(7)) * 0.3
    return tensors | {"lm_head.weight": head}


CHECKPOINTS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "a head of its own, configured as tied": own_head,
    "a head that equals the embedding": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
    "a head and no embedding": lambda t: {n.replace("model.embed_tokens", "lm_head"): w for n, w in t.items()},
    "the decoder's own names": lambda t: {n.removeprefix("model."): w for n, w in t.items()},
    "an embedding of another dtype": lambda t: t | {"model.embed_tokens.weight": t["model.embed_tokens.weight"].half()},
    "frequencies of an old version": lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_is_converted_is_what_transformers_loads(name: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "original")
    rewrite(tmp_path / "original", CHECKPOINTS[name])
    expected, got, perplexity = streamed_logits(tmp_path / "original", tmp_path / "out")
    assert relative(got, expected) < 1e-4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    whole, _ = convert(model, FULL, collect_statistics(model, TEXT))
    assert relative(whole(tokens()).logits, expected) < 1e-4
    assert perplexity == pytest.approx(compare(model, whole, HELDOUT).perplexity_original, rel=1e-4)


def test_a_head_of_its_own_survives_saving_and_the_served_form(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "original")
    rewrite(tmp_path / "original", own_head)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    converted, _ = convert(model, FULL, collect_statistics(model, TEXT))
    converted.save_pretrained(tmp_path / "saved")
    for other in (AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), to_served(converted)):
        assert not other.config.tie_word_embeddings
        assert relative(other(tokens()).logits, model(tokens()).logits) < 1e-3


def test_of_two_sets_of_weights_the_one_that_transformers_reads(tmp_path: Path) -> None:
    """An earlier sharded save of another model, and a later one in a single file."""
    folder = tmp_path / "original"
    tiny_model(seed=1).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    tiny_model(seed=2).save_pretrained(tmp_path / "later")
    (folder / "model.safetensors").write_bytes((tmp_path / "later" / "model.safetensors").read_bytes())
    expected, got, _ = streamed_logits(folder, tmp_path / "out")
    assert relative(got, expected) < 1e-4
    assert relative(got, tiny_model(seed=1)(tokens()).logits) > 0.1  # control: the other set is another model


def test_the_dtype_is_the_one_that_transformers_takes(tmp_path: Path) -> None:
    """The configuration's, and where it names none that of the first numbers in the file."""
    folder = tmp_path / "original"
    tiny_model().bfloat16().save_pretrained(folder)
    rewrite(folder, lambda t: {n: w.float() if "layers.1" in n else w for n, w in t.items()})
    streamed_logits(folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "dtype"}))
    streamed_logits(folder, tmp_path / "again")


def test_missing_and_foreign_tensors_and_a_lost_index_are_named_before_work_begins(tmp_path: Path) -> None:
    folder = tmp_path / "original"
    tiny_model().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    wrong = {
        "lacks 1 tensor .model.layers.1.mlp.up_proj.weight": {n: w for n, w in stored.items() if "1.mlp.up" not in n},
        "holds besides its model 1 tensor .score.weight": stored | {"score.weight": torch.ones(2)},
        r"model.norm.weight as \(31,\), its configuration as \(32,\)": stored | {"model.norm.weight": torch.ones(31)},
    }
    for message, tensors in wrong.items():
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            convert_streamed(folder, tmp_path / "out", FULL, TEXT, [], on_layer=killed_at_once)
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = folder / "model.safetensors.index.json"
    for text in ("[]", "{", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="is no index of a checkpoint"):
            convert_streamed(folder, tmp_path / "out", FULL, TEXT, [])
    index.unlink()
    with pytest.raises(ValueError, match="safetensors files .model-00001.* but no model.safetensors.index.json"):
        convert_streamed(folder, tmp_path / "out", FULL, TEXT, [])

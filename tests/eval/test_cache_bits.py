"""Perplexity of decoding through caches in few bits, and the bytes that they take."""

import gzip
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from eval.cache_bits import SETTINGS, bytes_a_token, decoding_perplexity, main, original_numbers
from eval.perplexity import perplexity
from mha2mla import ConversionOptions, QuantizedLatentCache, convert
from tests.eval.test_benchmarks import write_words
from tests.tiny import tiny_model
from tests.train.tiny import VOCAB, write_model

MLA = ConversionOptions(rope_dim=8, kv_lora_rank=16)
LAYERS = 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", dropout=0.0, mla=MLA)
    write_words(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_bytes_of_a_coded_token_are_the_same_in_every_dtype(family: str) -> None:
    """Scales of normed keys are not coded (qwen3); layers with a window may be left as they are (gemma2)."""
    options = ConversionOptions(rope_dim=8, kv_lora_rank=16, layers="full-attention" if family == "gemma2" else "all")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = convert(tiny_model(family), options)[0].eval().to(dtype)
        cache = QuantizedLatentCache(model.config, 4, None)
        decoding_perplexity(model, windows(2, 40), cache)
        found.append(bytes_a_token(cache)[0])
    latent, scales = len(model.config.latent_layers or range(LAYERS)), model.config.key_scales
    assert found == [latent * (16 / 2 + 2 + 2 + 2 * 8 + 2 * scales)] * 2


def test_the_originals_numbers_are_those_of_the_configuration() -> None:
    for family, numbers in (("llama", 32), ("qwen3", 48), ("gpt_neox", 64)):
        config = convert(tiny_model(family), ConversionOptions(rope_dim=8, kv_lora_rank=16))[0].config
        assert original_numbers(config, None) == original_numbers(config, numbers) == numbers
        with pytest.raises(ValueError, match=f"--original 7: the model's original caches {numbers} numbers"):
            original_numbers(config, 7)


def windows(number: int = 3, length: int = 48) -> torch.Tensor:
    return torch.randint(1, VOCAB, (number, length), generator=torch.Generator().manual_seed(1))


def test_token_by_token_is_the_perplexity_of_whole_windows(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = windows()
    exact = perplexity(model, list(text))
    assert decoding_perplexity(model, text, DynamicCache()) == pytest.approx(exact, rel=1e-5)
    fine, coarse = (QuantizedLatentCache(model.config, bits, bits, residual_length=4) for bits in (8, 2))
    near, far = (decoding_perplexity(model, text, cache) for cache in (fine, coarse))
    assert abs(near / exact - 1) < 0.01 < abs(far / exact - 1)
    held, kept = bytes_a_token(coarse)
    assert kept == 8 and held == LAYERS * ((16 + 8) / 4 + 2 * 2 + 2 * 2)


def test_no_coded_token_is_said_so(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    cache = QuantizedLatentCache(model.config, 4)
    decoding_perplexity(model, windows(length=8), cache)
    with pytest.raises(ValueError, match="must be longer"):
        bytes_a_token(cache)


def write_text(root: Path) -> tuple[Path, Path]:
    words = " ".join(f"w{(7 * n + n // 13) % VOCAB}" for n in range(3000))
    text, corpus = root / "text.txt", root / "corpus.jsonl.gz"
    text.write_text(words)
    with gzip.open(corpus, "wt") as file:
        for number in range(4):
            file.write(json.dumps({"text": f"w{number} {words}"}) + "\n")
    return text, corpus


def call(monkeypatch: pytest.MonkeyPatch, model: Path, *words: str) -> None:
    arguments = [str(model), "--length", "60", "--tokens", "120", *words]
    monkeypatch.setattr(sys, "argv", ["cache_bits", *arguments])
    main()


def test_every_setting_becomes_a_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, corpus = write_text(tmp_path)
    words = ["--text", str(text), "--calibrate", str(corpus), "--output", str(tmp_path / "out")]
    call(monkeypatch, folder, *words, "--stock")
    result = json.loads((tmp_path / "out.json").read_text())
    rows = result["rows"]
    stock = [row["stock"] for row in rows if "stock" in row]
    assert "fp8" in stock and len(rows) == 2 + len(stock) + 2 * len(SETTINGS)
    assert result["calibration_tokens"] == 4096
    assert rows[0]["bytes_per_token"] == LAYERS * 2 * 24 and rows[0]["reduction"] == 1 - 24 / 32
    [control] = [row for row in rows if row.get("control")]
    [same] = [
        row
        for row in rows
        if (row["bits"], row["rope_bits"], row["calibrated"], row["rotated"]) == (4, 8, True, False)
        and row is not control
    ]
    assert control["bytes_per_token"] == same["bytes_per_token"]
    assert abs(control["against_whole"] - 1) > abs(same["against_whole"] - 1)
    [row] = [row for row in rows if (row["bits"], row["rope_bits"], row["rotated"]) == (4, 4, True)]
    assert row["bytes_per_token"] == LAYERS * 12 and row["reduction"] == pytest.approx(1 - 6 / 32)
    assert row["tokens_kept_whole"] == 36 and math.isfinite(row["perplexity"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_what_cannot_be_measured_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, corpus = write_text(tmp_path)
    (tmp_path / "short.txt").write_text("w1 w2")
    write_model(tmp_path / "plain")
    write_words(tmp_path / "plain")
    output = ["--output", str(tmp_path / "out")]
    for model, texts, calibrate, message in (
        (tmp_path / "nothing", text, corpus, "no checkpoint"),
        (tmp_path / "plain", text, corpus, "not a converted model"),
        (folder, tmp_path / "short.txt", corpus, "less than a window"),
        (folder, text, tmp_path / "short.txt", "documents of 1024 tokens found"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, model, "--text", str(texts), "--calibrate", str(calibrate), *output)
        assert stop.value.code == 1 and message in capsys.readouterr().err

"""Perplexity by position: ranges that cover every predicted token once, of documents that are long enough."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from eval import positions
from eval.perplexity import perplexity
from eval.text import passages
from tests.eval.tiny import model, tokenizer


def write_corpus(file: Path) -> str:
    lines = ["too short", " ".join(passages()[:40]), " ".join(passages()[40:80]), " ".join(passages()[80:120])]
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return str(file)


def test_ranges_double_and_end_with_the_document() -> None:
    assert positions.ranges(4096) == [(0, 256), (256, 512), (512, 1024), (1024, 2048), (2048, 4096)]
    assert positions.ranges(700) == [(0, 256), (256, 512), (512, 700)]


def test_ranges_together_are_the_perplexity_of_whole_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(positions, "native_autocast", lambda device: torch.autocast(device, enabled=False))
    for seed in (0, 1):
        model(seed).save_pretrained(tmp_path / str(seed))
    tokenizer().save_pretrained(tmp_path / "0")
    words = [f"one={tmp_path / '0'}", f"two={tmp_path / '1'}", "--files", write_corpus(tmp_path / "text.jsonl")]
    words += ["--length", "700", "--documents", "2", "--output", str(tmp_path / "out" / "positions")]
    monkeypatch.setattr(sys, "argv", ["positions", *words])
    positions.main()
    found = json.loads((tmp_path / "out" / "positions.json").read_text())
    documents = positions.long_documents([str(tmp_path / "text.jsonl")], tokenizer(), 700, 2)
    for name, seed in (("one", 0), ("two", 1)):
        parts = zip(found["perplexity"][name], (255, 256, 188), strict=True)
        whole = math.exp(sum(math.log(value) * tokens for value, tokens in parts) / 699)
        assert whole == pytest.approx(perplexity(model(seed), documents), rel=1e-4)
    assert found["perplexity"]["one"] != found["perplexity"]["two"]
    assert (tmp_path / "out" / "positions.png").stat().st_size > 10_000
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_too_few_long_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 documents of 700 tokens found, 4 wanted"):
        positions.long_documents([write_corpus(tmp_path / "text.jsonl")], tokenizer(), 700, 4)

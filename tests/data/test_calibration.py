"""Calibration and held-out batches: shapes, determinism, and that they never share a document."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from conf.schema import Config
from data.calibration import calibration_batches, heldout_batches
from tests.data.corpora import documents, local, make_config, write_jsonl


def make(tmp_path: Path, texts: list[str], **data: object) -> tuple[Config, object]:
    config = make_config(tmp_path, {"a": local(write_jsonl(tmp_path / "a.jsonl", texts))}, **data)
    config.calibration.tokens, config.calibration.sequence_length, config.calibration.batch_size = 320, 32, 4
    return config, AutoTokenizer.from_pretrained(config.model.path)


def starts(batches: list[torch.Tensor]) -> set[tuple[int, ...]]:
    return {tuple(row[:8].tolist()) for batch in batches for row in batch}


def test_shapes_and_determinism(tmp_path: Path) -> None:
    config, tokenizer = make(tmp_path, documents(300))
    batches = list(calibration_batches(config, tokenizer))
    assert [tuple(batch.shape) for batch in batches] == [(4, 32), (4, 32), (2, 32)]
    assert all(batch.dtype == torch.int64 for batch in batches)
    again = list(calibration_batches(config, tokenizer))
    assert all(torch.equal(*pair) for pair in zip(batches, again, strict=True))
    config.data.seed = 1
    assert starts(batches) != starts(list(calibration_batches(config, tokenizer)))
    assert [b.shape[0] for b in heldout_batches(config, tokenizer, tokens=64, sequence_length=16, batch_size=2)] == [
        2,
        2,
    ]


def test_calibration_is_never_held_out(tmp_path: Path) -> None:
    """Long documents of one word each, told apart by it; half of them held out, all of both sides asked for."""
    texts = [" ".join([f"w{n}"] * 40) for n in range(200)]
    config, tokenizer = make(tmp_path, texts, tokens=640, validation_tokens=6400)
    words: list[set[int]] = []
    for function in (calibration_batches, heldout_batches):
        batches = list(function(config, tokenizer, tokens=70 * 32))
        words.append(set(torch.cat(batches).unique().tolist()) - {tokenizer.eos_token_id})  # type: ignore[attr-defined]
    assert len(words[0]) > 50 and len(words[1]) > 50
    assert not words[0] & words[1]


def test_weights_and_several_files(tmp_path: Path) -> None:
    """Three times the weight, three times the rows; text of every file although one would do."""
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [" ".join([f"w{n}"] * 60)] * 3 + documents(500, n)) for n in range(2)]
    ones = write_jsonl(tmp_path / "ones.jsonl", [" ".join(["w199"] * 50 + [f"w{n}"]) for n in range(150)])
    config = make_config(tmp_path, {"a": local(*files, weight=3), "b": local(ones, weight=1)})
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    rows = torch.cat(list(calibration_batches(config, tokenizer, tokens=64 * 32, sequence_length=32)))
    of_ones = (rows == tokenizer.convert_tokens_to_ids("w199")).float().mean(1) > 0.9
    assert rows.shape == (64, 32) and int(of_ones.sum()) == 16


def test_too_little_text_says_how_much(tmp_path: Path) -> None:
    config, tokenizer = make(tmp_path, documents(20))
    with pytest.raises(ValueError, match=r"calibration: \d+ sequences of 32 tokens found, 1000 wanted"):
        calibration_batches(config, tokenizer, tokens=32_000)
    with pytest.raises(ValueError, match="held-out data: .* wanted"):
        heldout_batches(config, tokenizer, tokens=32_000)

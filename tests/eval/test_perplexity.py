"""Perplexity against the plain computation, and windows that respect documents."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import eval.perplexity as module
from data.windows import text_windows
from eval.perplexity import document_windows, packed_windows, perplexity
from mha2mla import output_head
from tests.eval.tiny import model, tokenizer


def windows(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 600, (length,), generator=generator) for length in lengths]


def plain(tiny: torch.nn.Module, pieces: list[torch.Tensor]) -> float:
    """Window by window, with the model's own loss."""
    with torch.inference_mode():
        losses = [tiny(input_ids=piece[None], labels=piece[None]).loss.item() * (len(piece) - 1) for piece in pieces]
    return math.exp(sum(losses) / sum(len(piece) - 1 for piece in pieces))


def test_equals_the_plain_computation_for_windows_of_any_length(monkeypatch):
    tiny, pieces = model(), windows(40, 7, 40, 2, 33)
    expected = plain(tiny, pieces)
    assert perplexity(tiny, pieces) == pytest.approx(expected, rel=1e-5)
    # However it is cut into forward passes and chunks of logits.
    monkeypatch.setattr(module, "FORWARD_TOKENS", 50)
    monkeypatch.setattr(output_head, "ROWS", {"cpu": 9})
    seen = []
    assert perplexity(tiny, pieces, seen.append) == pytest.approx(expected, rel=1e-5)
    assert sum(seen) == 122 and len(seen) > 2
    # A control: a mean over windows instead of over tokens is another number.
    by_window = math.exp(sum(math.log(plain(tiny, [piece])) for piece in pieces) / len(pieces))
    assert abs(by_window / expected - 1) > 0.005


def test_a_family_that_changes_its_logits_after_the_head_is_measured_with_them():
    torch.manual_seed(0)
    sizes = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
    tiny = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=2.0)).eval()
    pieces = windows(20, 9)
    assert perplexity(tiny, pieces) == pytest.approx(plain(tiny, pieces), rel=1e-5)
    capped = perplexity(tiny, pieces)
    tiny.config.final_logit_softcapping = None
    assert abs(perplexity(tiny, pieces) / capped - 1) > 0.01


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="at least one window"):
        perplexity(model(), [])


def test_text_windows_are_consecutive_and_without_special_tokens(tmp_path):
    text = "The turtle moves forward by one step. " * 40
    file = tmp_path / "text.txt"
    file.write_text(text)
    pieces = text_windows(tokenizer(), file, 64, 200)
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert [len(piece) for piece in pieces] == [64, 64, 64]
    assert torch.cat(pieces).tolist() == ids[:192] and tokenizer().bos_token_id not in ids
    with pytest.raises(ValueError, match="less than a window of 5000"):
        text_windows(tokenizer(), file, 5000, 10000)


def test_windows_of_packed_rows_end_with_their_documents():
    ids = torch.arange(100)
    positions = torch.cat(
        [torch.arange(30, 50), torch.arange(5), torch.arange(75)]
    )  # a row may begin inside a document
    pieces = document_windows(ids, positions, 32)
    assert [(int(piece[0]), len(piece)) for piece in pieces] == [(0, 20), (25, 32), (57, 32)]  # 5 and 11 are too short


def write_split(folder: Path, rows: list[tuple[list[int], list[int]]]) -> None:
    half = len(rows) // 2
    for part, chosen in enumerate((rows[:half], rows[half:])):
        table = pa.table({"input_ids": [ids for ids, _ in chosen], "position_ids": [places for _, places in chosen]})
        pq.write_table(table, folder / f"validation-{part:05d}.parquet")


def test_rows_are_taken_from_the_whole_split(tmp_path):
    rows = [([index] * 64, list(range(64))) for index in range(20)]
    write_split(tmp_path, rows)
    assert [int(piece[0]) for piece in packed_windows(tmp_path, 64, 4 * 64)] == [0, 6, 13, 19]
    assert len(packed_windows(tmp_path, 32, 10**9)) == 40
    with pytest.raises(ValueError, match="no validation-"):
        packed_windows(tmp_path / "nowhere", 64, 256)


def test_no_token_is_predicted_from_another_document(tmp_path):
    first, second = windows(32, 32)
    rows = [(torch.cat([first, second]).tolist(), [*range(32), *range(32)])] * 2
    write_split(tmp_path, rows)
    tiny = model()
    apart = perplexity(tiny, packed_windows(tmp_path, 64, 128))
    assert apart == pytest.approx(plain(tiny, [first, second]), rel=1e-5)
    # A control: across the boundary it is another number.
    assert abs(plain(tiny, [torch.cat([first, second])]) / apart - 1) > 1e-3


def test_a_model_whose_logits_are_not_finite_has_no_perplexity():
    tiny = model()
    tiny.lm_head.weight.data[7, 3] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite .*run it in bfloat16 or float32"):
        perplexity(tiny, windows(20))


def test_of_a_large_text_only_the_wanted_part_is_read(tmp_path: Path) -> None:
    text = "\n".join(f"Line {number} of a text that goes on and on." for number in range(20_000))
    file = tmp_path / "text.txt"
    file.write_text(text)
    whole, read = tokenizer()(text, add_special_tokens=False)["input_ids"], []

    def reading(part: str, **options: bool) -> dict[str, list[int]]:
        read.append(len(part))
        return tokenizer()(part, **options)

    for tokens in (64, 3000, 10**9):
        read.clear()
        found = torch.cat(text_windows(reading, file, 32, tokens)).tolist()
        assert found == whole[: min(tokens, len(whole)) // 32 * 32]
        assert (max(read) == len(text)) == (tokens == 10**9)
        assert tokens > 64 or max(read) < len(text) / 50


def test_of_a_split_only_the_rows_taken_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows spread over all files, as if these were one table."""
    ids = torch.arange(40 * 32).view(40, 32)
    positions = torch.arange(32).expand(40, 32)
    for number, part in enumerate(ids.split(16)):
        table = pa.table({"input_ids": part.tolist(), "position_ids": positions[: len(part)].tolist()})
        pq.write_table(table, tmp_path / f"validation-{number:05d}-of-00003.parquet", row_group_size=5)
    monkeypatch.setattr(pq.ParquetDataset, "read", None)
    found = packed_windows(tmp_path, 32, 7 * 32)
    assert [int(window[0]) // 32 for window in found] == [0, 6, 13, 20, 26, 32, 39]
    assert all(len(window) == 32 for window in found)

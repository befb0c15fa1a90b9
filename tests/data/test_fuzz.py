"""Damaged training files: every one gives texts or is refused in one line that names it (tests/fuzz.py)."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.sources import list_parts, read_texts
from tests.data.corpora import local
from tests.data.test_sources import COMPRESS
from tests.fuzz import json_mutations, mutations, refusal

MESSAGES = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven, é."}]
ROWS = [{"id": n, "text": f"row {n} of some words", "messages": MESSAGES, "meta": {"tags": ["a"]}} for n in range(6)]
COUNT = 60  # damaged copies of each file


def as_lines(rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in (rows if isinstance(rows, list) else [rows]))


def as_parquet(rows: list[Any]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream, compression="none")
    return stream.getvalue()


FILES: dict[str, Callable[[list[Any]], bytes]] = {
    "a.jsonl": as_lines,
    "a.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "a.ndjson": lambda rows: as_lines(rows).decode().encode("utf-16"),
    "a.parquet": as_parquet,
    "a.txt": as_lines,
    **{f"a.jsonl{ending}": lambda rows, each=each: each(as_lines(rows)) for ending, each in COMPRESS.items() if ending},
}


def read(file: Path, column: str) -> list[str]:
    options = {"text_column": "text"} if column == "text" else {"messages_column": "messages"}
    texts = [text for part in list_parts("corpus", local(file, **options), 0) for text in read_texts(part)]
    for text in texts:
        assert text.encode() and not text.isspace()
    return texts


@pytest.mark.parametrize("column", ["text", "messages"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_damaged_bytes(tmp_path: Path, name: str, column: str, fuzz: int) -> None:
    if (name, column) == ("a.txt", "messages"):
        pytest.skip("text files hold no conversations")
    file, whole = tmp_path / name, FILES[name](ROWS)
    file.write_bytes(whole)
    texts = read(file, column)
    assert len(texts) == (1 if name == "a.txt" else len(ROWS))

    def attempt() -> None:
        found = read(file, column)
        if name.endswith((".gz", ".bz2", ".xz")):  # these hold sums of what is in them
            assert found in (texts, []), "other text than was written"

    refused = 0
    for damaged in mutations(whole, 0, COUNT * fuzz):
        file.write_bytes(damaged)
        refused += refusal(attempt, name) is not None
    assert refused, "damage that is never noticed is no test"


@pytest.mark.parametrize("column", ["text", "messages"])
def test_rows_of_other_forms(tmp_path: Path, column: str, fuzz: int) -> None:
    refused = 0
    for number, rows in enumerate(json_mutations(ROWS[:2], 0, 4 * COUNT * fuzz)):
        file = tmp_path / ("a.json" if number % 2 else "a.jsonl")
        file.write_bytes(json.dumps(rows).encode() if number % 2 else as_lines(rows))
        refused += refusal(lambda file=file: read(file, column), file.name) is not None
    assert 0 < refused < 4 * COUNT * fuzz

"""The pieces by themselves: sorting on disk, packing, shares, hashes; and the environment's text."""

import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data.builtin import CORPORA, environment_files, read_texts
from data.documents import LONGEST, Split, pieces
from data.pack import BLOCK, pack
from data.runs import Record, RunWriter, merge
from data.take import allot


def test_merge_sorts_more_than_memory_holds(tmp_path: Path) -> None:
    random_ = random.Random(0)
    records = [Record(random_.randbytes(16), n % 3, random_.randbytes(random_.randint(0, 400))) for n in range(3000)]
    records += records[:50]
    writers = [RunWriter(tmp_path / "runs" / name, run_bytes=20_000) for name in ("a", "b")]
    for n, record in enumerate(records):
        writers[n % 2].add(record)
    paths = [path for writer in writers for path in writer.close()]
    assert len(paths) > 20
    assert list(merge(paths)) == sorted(records, key=lambda r: (r.key, r.source))


def test_packing_equals_doing_it_one_token_at_a_time() -> None:
    length = 7
    random_ = random.Random(0)
    documents = [np.arange(random_.choice([1, 2, 5, 30, 400]), dtype=np.int32) + 1000 * n for n in range(200)]
    rows, positions, row, place = [], [], [], []
    for document in documents:
        for at, token in enumerate(document):
            place.append(min(at, len(row)))
            row.append(int(token))
            if len(row) == length:
                rows.append(row)
                positions.append(place)
                row, place = [], []
    blocks = list(pack(documents, length))
    assert len(blocks) > 2 and all(len(ids) <= BLOCK for ids, _ in blocks)
    assert np.concatenate([ids for ids, _ in blocks]).tolist() == rows
    assert np.concatenate([places for _, places in blocks]).tolist() == positions


@pytest.mark.parametrize(("total", "weights"), [(10, [1, 1, 1]), (7, [0.7, 0.15, 0.08, 0.06, 0.01]), (0, [2, 1])])
def test_allot_is_exact_and_proportional(total: int, weights: list[float]) -> None:
    shares = allot(total, weights)
    assert sum(shares) == total
    assert all(abs(s - total * w / sum(weights)) < 1 for s, w in zip(shares, weights, strict=True))


def test_hashes_are_even_and_depend_on_seed_and_text() -> None:
    split, other = Split(0, 0.2), Split(1, 0.2)
    places = [split.place(split.key(f"text {n}")) for n in range(5000)]
    held = [rank for side, rank in places if side == "validation"]
    assert 0.18 < len(held) / len(places) < 0.22
    assert 0.47 < np.mean(held) < 0.53 and 0 <= min(held) and max(held) < 1
    assert split.key("a") == Split(0, 0.5).key("a") != other.key("a")


def test_a_very_long_text_is_cut_into_documents_of_one_side() -> None:
    split = Split(0, 0.5)
    text = "\n".join(f"line {n}" for n in range(100_000))
    key = split.key(text)
    cut = list(pieces(key, text))
    assert "".join(piece for _, piece in cut) == text and len(cut) > 4
    assert all(len(piece) <= LONGEST and piece.endswith("\n") for _, piece in cut[:-1])
    assert len({k for k, _ in cut}) == len(cut) and {split.place(k) for k, _ in cut} == {split.place(key)}
    assert list(pieces(key, "short")) == [(key, "short")]


def test_the_environment_holds_enough_clean_text() -> None:
    """Enough for three million tokens in the shipped proportions; nothing that evaluation asks about."""
    files = environment_files()
    standard = sysconfig.get_path("stdlib") + "/"
    packages = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    assert set(files) == set(CORPORA)
    assert all(file.path.startswith(packages) for file in files["code"])  # the library's code is a task
    assert any(f.path.startswith(standard) and not f.path.startswith(packages) for f in files["docstrings"])
    assert not {file.path for file in files["code"]} & {file.path for file in files["docstrings"]}
    names = [file.name for corpus in CORPORA for file in files[corpus]]
    assert not [name for name in names if "/tests/" in name or "_vendor/" in name or "LICENSE" in name]
    needed = {"prose": 0.12, "docstrings": 0.63, "code": 0.25}
    for corpus, share in needed.items():
        chosen = files[corpus][:: max(1, len(files[corpus]) // 200)]
        texts = [text for file in chosen for text in read_texts(corpus, file.path)]
        characters = sum(map(len, texts)) * len(files[corpus]) / len(chosen)
        assert characters / 4.5 > share * 3_000_000, corpus  # tokens, at the most characters a token seen
        letters = sum(character.isalpha() or character.isspace() for text in texts for character in text)
        assert letters > 0.7 * sum(map(len, texts)), corpus


def test_docstrings_keep_documentation_and_leave_code() -> None:
    path = next(file.path for file in environment_files()["docstrings"] if file.name == "textwrap.py")
    [text] = read_texts("docstrings", path)
    assert text.startswith("Text wrapping and filling.")
    assert "class TextWrapper" in text and "dedent(text)\n\nRemove any common leading whitespace" in text
    assert "import re" not in text

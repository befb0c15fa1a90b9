"""Files as they are found: what is in other fields does not matter, what is empty or bad is skipped and counted."""

import gzip
import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from conf.plan import Plan
from conf.schema import SourceConfig, SourceKind
from data.calibration import calibration_batches
from data.chats import as_text
from data.documents import Split
from data.rows import Text
from data.sample import sample
from data.skipped import EARLY, FEW, FileRows, Skipped
from data.sources import Part, list_parts, read_texts
from data.spill import Task, spill_part
from data.windows import text_windows
from tests.data.corpora import documents, local, make_config, write_jsonl
from tests.data.test_chats import chat
from tests.data.test_sources import COMPRESS

GOOD = b'{"text": "good"}\n'


def read(tmp_path: Path, name: str, content: bytes, **options: Any) -> tuple[list[str], Skipped]:
    """Texts of one file and what was skipped of it."""
    (tmp_path / name).write_bytes(content)
    skipped = Skipped()
    parts = list_parts("corpus", local(tmp_path / name, **options), 0)
    return [text for part in parts for text in read_texts(part, skipped)], skipped


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_other_fields_may_change_their_type_far_into_a_file(tmp_path: Path) -> None:
    text = "some words of text " * 40
    rows = [{"text": f"{n} {text}", "meta": {"id": n}} for n in range(14_000)]
    rows += [{"text": "last", "meta": {"id": "x", "more": [1]}}, {"text": "and", "meta": 5}, {"text": "no meta"}]
    texts, skipped = read(tmp_path, "a.jsonl", lines(*rows))
    assert len(texts) == 14_003 and texts[-3:] == ["last", "and", "no meta"] and skipped == Skipped()


@pytest.mark.parametrize("empty", [{"text": None}, {}, {"text": " \n"}])
def test_rows_without_text_for_ten_megabytes(tmp_path: Path, empty: dict[str, Any]) -> None:
    texts, skipped = read(tmp_path, "a.jsonl", lines(*[empty | {"url": "u" * 700}] * 15_000, {"text": "last"}))
    assert texts == ["last"] and skipped == Skipped(empty_rows=15_000)


def test_files_without_a_row_among_good_ones(tmp_path: Path) -> None:
    contents = {
        "empty.jsonl": b"",
        "empty.parquet": b"",
        "empty.txt": b"",
        "blank.jsonl": b"\n \r\n\n",
        "none.json": b"[ ]\n",
        "zipped.jsonl.gz": gzip.compress(b""),
        "good.jsonl": GOOD,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "zero.parquet")
    pq.write_table(pa.table({"other": pa.array([], pa.string())}), tmp_path / "other.parquet")
    skipped = Skipped()
    assert [text for p in list_parts("c", local(tmp_path), 0) for text in read_texts(p, skipped)] == ["good"]
    assert skipped.empty_files + skipped.empty_rows == 8 and not skipped.bad_rows


BAD_ROWS = {
    "a number": (b'{"text": 5}', "holds a number, not text"),
    "NaN": (b'{"text": NaN}', "holds a number, not text"),
    "an object": (b'{"text": {"text": "x"}}', "holds an object, not text"),
    "a list": (b'{"text": ["x"]}', "holds a list, not text"),
    "no JSON": (b"text", "is not JSON: Expecting value at character 1"),
    "half a row": (b'{"text": "x', "is not JSON: Unterminated string"),
    "a list of rows": (b'[{"text": "x"}, 5]', "is a list, not an object with the field text"),
    "no object": (b"5", "is a number, not an object with the field text"),
    "two values": (b'{"text": "x", "text": "y"}', "has text more than once"),
    "half a character": (b'{"text": "x\\ud83d"}', r"holds the lone surrogate \ud83d (character 2)"),
    "Latin-1": (b'{"text": "caf\xe9"}', "holds the byte 0xe9, which is not UTF-8 there (character 4)"),
    "nesting": (b'{"text": ' + b"[" * 100_000, "is nested too deep"),
    "zeros": (b"\0" * 4096, "is not JSON"),
    "a number of many digits": (b'{"text": ' + b"1" * 5000 + b"}", "is not JSON that can be read"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_one_bad_row_is_skipped_and_many_are_an_error(tmp_path: Path, name: str) -> None:
    row, reason = BAD_ROWS[name]
    texts, skipped = read(tmp_path, "a.jsonl", GOOD * 2 + row + b"\n" + GOOD)
    assert texts == ["good"] * 3 and skipped.bad_rows == 1
    assert read(tmp_path, "b.jsonl", row + b"\n" + GOOD * 3)[1].bad_rows == 1
    assert skipped.first_bad.startswith(f"{tmp_path / 'a.jsonl'}, row 3: {reason}")
    for content in (row + b"\n" + row, GOOD * 90 + (row + b"\n") * 10):
        with pytest.raises(ValueError) as refused:
            read(tmp_path, "a.jsonl", content)
        assert f"cannot read {tmp_path / 'a.jsonl'}: row " in str(refused.value) and reason in str(refused.value)


@pytest.mark.parametrize(
    "row",
    [
        b'{"text": "good", "n": NaN, "m": -Infinity, "o": 1e999}',
        b'{"other": "caf\xe9 \\ud800", "text": "good"}',
        b'{"text": "good", "text": "good", "n": {"text": 1}}',
        b'{"n": {"text": 1, "text": 2}, "text": "good"}',
        b'\xef\xbb\xbf{"text": "good"}',
        b'{"text": "good\\n"}\r',
        b'{"text": "\\u0067ood", "n": "a\tb"}',
    ],
)
def test_what_does_no_harm(tmp_path: Path, row: bytes) -> None:
    assert read(tmp_path, "a.jsonl", row + b"\n" + GOOD) == (["good", "good"], Skipped())


@pytest.mark.parametrize(
    ("good", "bad", "refused"),
    [
        (1, 1, False),
        (0, 1, True),
        (1, 2, True),
        (10, FEW, False),
        (10, FEW + 1, True),
        (99 * 50, 50, False),
        (98 * 50, 51, True),
    ],
)
def test_how_many_bad_rows_are_too_many(good: int, bad: int, refused: bool) -> None:
    rows = FileRows("a", Skipped())
    for number in range(bad):
        rows.leave_bad(f"row {number}: is bad")
    rows.good = good
    if refused:
        with pytest.raises(ValueError, match=f"row 0: is bad .{bad} of {good + bad:,} rows are bad"):
            rows.close()
    else:
        rows.close()


def test_a_file_of_another_kind_is_not_read_to_its_end() -> None:
    rows = FileRows("a", Skipped())
    with pytest.raises(ValueError, match=f"{EARLY} of {EARLY} rows"):
        for number in range(10 * EARLY):
            rows.leave_bad(f"row {number}: is bad")


ROWS = [{"text": f"row {n} [{{é", "n": n} for n in range(5)]
TEXTS = [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2, ensure_ascii=False),
        "[\n" + ",\n".join(map(json.dumps, ROWS)) + ",\n]",
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "\r\n\r\n".join(map(json.dumps, ROWS)),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_arrangements_of_json_in_encodings(
    tmp_path: Path, content: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.json", "a.jsonl"):
        assert read(tmp_path, name, content.encode(encoding)) == (TEXTS, Skipped())
    monkeypatch.setattr("data.rows.HEAD", 48)  # as if it were far longer than what is held
    assert read(tmp_path, "a.json", content.encode(encoding)) == (TEXTS, Skipped())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(ROWS)[:-1], "ends in the midst of its array, behind row 5"),
        (json.dumps(ROWS)[:-9], "row 5 is not JSON"),
        (json.dumps(ROWS) * 2, "goes on behind its array of 5 rows"),
        ('[{"text": "x"} {"text": "y"]', "row 2 is not JSON"),
        ('[{"text": ' + "[" * 100_000, "row 1 is nested too deep"),
        (json.dumps({"data": ROWS}), "text_column=text: .*a.json has no such column; it has data"),
        (json.dumps({"data": ROWS}, indent=1), "text_column=text: .*a.json has no such column; it has data"),
    ],
)
def test_arrays_that_are_not_whole(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "a.json", content.encode())


def test_an_array_in_one_line_is_held_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    more = Text.more
    monkeypatch.setattr("data.rows.Text.more", lambda self: (held.append(len(self.held)), more(self))[1])
    rows = [{"text": "w" * 1000, "n": n} for n in range(5000)]
    texts, _ = read(tmp_path, "a.json", json.dumps(rows).encode())
    assert len(texts) == 5000 and len(held) > 50 and max(held) < 200_000


def test_compression_is_read_off_the_file(tmp_path: Path) -> None:
    assert read(tmp_path, "a.jsonl", gzip.compress(GOOD * 3)) == (["good"] * 3, Skipped())
    assert read(tmp_path, "a.jsonl.gz", GOOD * 3) == (["good"] * 3, Skipped())
    assert read(tmp_path, "a.jsonl.gz", gzip.compress(GOOD) * 3) == (["good"] * 3, Skipped())  # in three members
    for ending, pack in COMPRESS.items():
        for rows in (b"", GOOD * 3):
            assert read(tmp_path, "b.jsonl", pack(rows))[0] == ["good"] * (len(rows) // len(GOOD)), ending
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"  # as `pzstd` begins its files
    assert read(tmp_path, "b.jsonl.zst", (skippable + COMPRESS[".zst"](GOOD)) * 2) == (["good"] * 2, Skipped())
    assert read(tmp_path, "b.txt", b"BZh is how they begin") == (["BZh is how they begin"], Skipped())
    assert {part.size is None for part in list_parts("c", local(tmp_path / "a*"), 0)} == {True}


def test_pointers_of_git_lfs_are_no_text(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}: is a pointer of Git LFS"):
            read(tmp_path, name, b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")


def test_files_with_names_that_mean_something_elsewhere(tmp_path: Path) -> None:
    for number, name in enumerate(("a b.jsonl", "c:d.jsonl", "zip:::e.jsonl", "[x]*?.jsonl", "#%20.JSONL", "ü.jsonl")):
        assert read(tmp_path, name, lines({"text": f"{number}"})) == ([f"{number}"], Skipped()), name
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"data_files: there are no files in .*folder.jsonl"):
        list_parts("corpus", local(tmp_path / "folder.jsonl"), 0)
    with pytest.raises(ValueError, match="has an empty entry"):
        list_parts("corpus", SourceConfig(data_files=[""]), 0)
    (tmp_path / "odd\udcff.jsonl").write_bytes(GOOD)
    with pytest.raises(ValueError, match=r"the name '.*odd.udcff.jsonl' holds the byte 0xff.*rename the file"):
        list_parts("corpus", local(tmp_path), 0)


def test_text_files_in_other_encodings(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        assert read(tmp_path, "a.txt", "é\r\nb".encode(encoding)) == (["é\nb"], Skipped())
    for content, message in (
        ("é".encode("utf-16-le") * 3, "NUL"),
        ("ab".encode("utf-16-le"), "NUL"),
        (b"x\xe9", "0xe9"),
    ):
        with pytest.raises(ValueError, match=rf"cannot read .*a.txt: .*{message}"):
            read(tmp_path, "a.txt", content)


def test_bad_lines_of_a_large_text_are_rows_too(tmp_path: Path) -> None:
    whole = [f"line {n} of a corpus in one file".encode() for n in range(60_000)]
    texts, skipped = read(tmp_path, "a.txt", b"\n".join([*whole[:500], b"caf\xe9", *whole[500:]]))
    assert "\n".join(texts).encode() == b"\n".join(whole)
    assert skipped.bad_rows == 1 and "row 501: holds the byte 0xe9" in skipped.first_bad


def test_columns_of_parquet(tmp_path: Path) -> None:
    texts = pa.array(["a", None, "b", " "])
    for column in (texts, texts.cast(pa.binary()), texts.dictionary_encode(), texts.cast(pa.large_string())):
        pq.write_table(pa.table({"text": column, "text.x": [1, 2, 3, 4]}), tmp_path / "a.parquet")
        found = read(tmp_path, "a.parquet", (tmp_path / "a.parquet").read_bytes())
        assert found == (["a", "b"], Skipped(empty_rows=2))
    broken = pa.array([b"a", b"b\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "b.parquet")
    found, skipped = read(tmp_path, "b.parquet", (tmp_path / "b.parquet").read_bytes())
    assert found == ["a", "c"] and skipped.bad_rows == 1 and "b.parquet, row 2: " in skipped.first_bad
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="c.parquet: row 1: holds a number, not text"):
        read(tmp_path, "c.parquet", (tmp_path / "c.parquet").read_bytes())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_files_at_an_address(tmp_path: Path, name: str) -> None:
    """Memory stands in for the hub: another file system, opened as the hub's is."""
    pq.write_table(pa.table({"text": ["good"] * 500, "n": range(500)}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(GOOD * 500)
    (tmp_path / "a.jsonl.zst").write_bytes(COMPRESS[".zst"](GOOD * 500))
    fsspec.filesystem("memory").pipe(f"/corpus/{name}", (tmp_path / name).read_bytes())
    part = Part("c", "parquet" if name == "a.parquet" else "json", (f"memory://corpus/{name}",), "text", False, None)
    assert list(read_texts(part)) == ["good"] * 500


def test_a_zip_file_of_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    with zipfile.ZipFile(tmp_path / "repo" / "train.zip", "w") as archive:
        archive.writestr("a.jsonl", GOOD)
        archive.writestr("b.jsonl", '{"text": "other", "n": 1}\n{"text": 5}\n')
    parts = list_parts("c", SourceConfig(kind=SourceKind.hub, path=str(tmp_path / "repo")), 0)
    skipped = Skipped()
    assert sorted(text for part in parts for text in read_texts(part, skipped)) == ["good", "other"]
    assert skipped.bad_rows == 1


SAYS = chat("w3", "w4")


@pytest.mark.parametrize(
    "messages",
    [
        SAYS,
        json.dumps(SAYS),
        {"role": ["w0", "w1"], "content": ["w3", "w4"]},
        [each | {"content": [{"type": "text", "text": each["content"]}]} for each in SAYS],
        [each | {"name": None} for each in SAYS],
    ],
)
def test_forms_of_conversations(tmp_path: Path, messages: Any) -> None:
    content = lines({"messages": messages, "n": 1}, {"messages": SAYS, "n": "x"})
    assert read(tmp_path, "a.jsonl", content, messages_column="messages") == ([as_text(SAYS)] * 2, Skipped())


@pytest.mark.parametrize("messages", [None, [], "", [each | {"content": None} for each in SAYS], chat("", " ")])
def test_conversations_that_say_nothing_are_skipped(tmp_path: Path, messages: Any) -> None:
    content = lines({"messages": messages}, {"messages": SAYS})
    found = read(tmp_path, "a.jsonl", content, messages_column="messages")
    assert found == ([as_text(SAYS)], Skipped(empty_rows=1))


@pytest.mark.parametrize(
    "messages",
    [
        5,
        "hello",
        {"role": "user", "content": "abcd"},
        {"role": ["w0", "w1"], "content": ["w3"]},
        [{"from": "human", "value": "w3"}],
        [{"role": "user", "text": "w3"}],
        [{"role": None, "content": "w3"}],
        [None],
        chat("w3") + [{"role": "w1", "content": 5}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w3"}]}],
        chat("w3 \ud800"),
    ],
)
def test_rows_that_are_no_conversations_are_bad(tmp_path: Path, messages: Any) -> None:
    content = lines({"messages": SAYS}, {"messages": messages})
    texts, skipped = read(tmp_path, "a.jsonl", content, messages_column="messages")
    assert texts == [as_text(SAYS)] and skipped.bad_rows == 1 and "a.jsonl, row 2: " in skipped.first_bad


def test_what_was_skipped_is_told_and_does_not_depend_on_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = documents(600)
    write_jsonl(tmp_path / "a" / "0.jsonl", texts[:300])
    good = write_jsonl(tmp_path / "a" / "1.jsonl", texts[300:]).read_text()
    (tmp_path / "a" / "1.jsonl").write_text('{"text": 5}\n{"text": null}\n{"text": ["x"]}\n' + good)
    (tmp_path / "a" / "2.jsonl").write_text("")
    manifests = []
    for workers in (1, 2):
        config = make_config(tmp_path, {"a": local(tmp_path / "a")}, name=f"w{workers}", num_workers=workers)
        sample(config)
        manifests.append(json.loads((Plan(config).sample.folder / "manifest.json").read_text()))
    assert manifests[0]["sources"] == manifests[1]["sources"] and manifests[0]["shards"] == manifests[1]["shards"]
    skipped = Skipped(2, 1, 1, f"{tmp_path}/a/1.jsonl, row 1: holds a number, not text")
    assert manifests[0]["sources"]["a"]["skipped"] == asdict(skipped)
    told = f"2 bad rows (the first: {skipped.first_bad}), 1 row without text, 1 file without a row"
    assert f"skipped: {told}\n" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    list(calibration_batches(config, tokenizer, tokens=12_800, sequence_length=64))
    assert f"data for calibration: data.sources.a: skipped {told[:30]}" in capsys.readouterr().out


def test_a_restart_counts_what_was_read_before(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD * 5 + b"5\n")
    [part] = list_parts("a", local(file), 0)
    sides = {"train": 1e9, "validation": 1e9}
    task = Task(part, 0, Split(0, 0.1), True, sides, dict.fromkeys(sides, 1.0), str(tmp_path / "work"))
    first = spill_part(task)
    file.unlink()
    assert spill_part(task) == first and first.skipped["bad_rows"] == 1


def test_texts_to_measure_perplexity_on(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_config(tmp_path, {}).model.path)
    words = "w1 w2\r\nw3 w4 w5"
    for content in (words.encode(), words.encode("utf-8-sig"), words.encode("utf-16"), gzip.compress(words.encode())):
        (tmp_path / "a.txt").write_bytes(content)
        assert [window.tolist() for window in text_windows(tokenizer, tmp_path / "a.txt", 2, 4)] == [[2, 3], [4, 5]]
    for name, content, message in (
        ("a.txt", b"caf\xe9", "cannot read .*a.txt: holds the byte 0xe9"),
        ("a.txt", b"w1\0w2", "cannot read .*a.txt: holds NUL"),
        ("a.txt", gzip.compress(words.encode())[:-3], "cannot read .*a.txt: Truncated"),
        ("a.jsonl", GOOD, "a.jsonl has rows, and a plain text file is wanted"),
        ("b.txt", None, "b.txt: no such file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            text_windows(tokenizer, tmp_path / name, 2, 4)

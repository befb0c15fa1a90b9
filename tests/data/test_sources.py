"""Reading: every format and compression, every way to name files, and what is said of bad ones."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from conf.plan import Plan
from conf.schema import DataConfig, SourceConfig, SourceKind, typed_config
from data.draw import open_sources
from data.sample import load_tokenizer, sample
from data.sources import list_parts, read_texts
from tests.data.corpora import documents, local, make_config, write_jsonl

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def texts_of(source: SourceConfig, seed: int = 0) -> list[str]:
    return [text for part in list_parts("corpus", source, seed) for text in read_texts(part)]


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines_and_text_compressed_or_not(tmp_path: Path, ending: str) -> None:
    lines = (
        "".join(json.dumps({"text": f"row {n}", "n": n}) + "\n" for n in range(3)) + '{"text": null}\n{"text": " "}\n'
    )
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](lines.encode()))
    (tmp_path / f"b.txt{ending}").write_bytes(COMPRESS[ending]("first line\nsecond line, é\n".encode()))
    assert sorted(texts_of(local(tmp_path))) == ["first line\nsecond line, é", "row 0", "row 1", "row 2"]


def test_parquet_and_json_arrays_and_other_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["p", "q"], "other": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps([{"content": "r", "other": {"x": 1}}]))
    source = local(tmp_path / "a.parquet", tmp_path / "b.json", text_column="content")
    assert sorted(texts_of(source)) == ["p", "q", "r"]


def test_globs_folders_and_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "deep" / "er" / "a [1].jsonl", ["a"])
    write_jsonl(tmp_path / "deep" / "b.jsonl", ["b"])
    (tmp_path / "deep" / "notes.pdf").write_bytes(b"x")
    assert sorted(texts_of(local(tmp_path / "deep"))) == ["a", "b"]
    assert texts_of(local(tmp_path / "deep" / "*.jsonl")) == ["b"]
    assert sorted(texts_of(local(tmp_path / "**" / "*.jsonl"))) == ["a", "b"]
    assert texts_of(local(tmp_path / "deep" / "er" / "a [1].jsonl")) == ["a"]
    monkeypatch.chdir(tmp_path)
    assert texts_of(local(Path("deep/b.jsonl"), Path("deep/*.jsonl"))) == ["b"]


def test_order_of_files_is_a_shuffle_by_seed_and_name(tmp_path: Path) -> None:
    """The same wherever the corpus lies; another seed gives another order. Large files, so that each is a part."""
    for home in ("here", "there"):
        for n in range(6):
            write_jsonl(tmp_path / home / f"{n}.jsonl", [f"{n}"])
    orders = [texts_of(local(tmp_path / home), seed) for home, seed in (("here", 0), ("there", 0), ("here", 1))]
    named = [texts_of(local(tmp_path / home / "*"), 0) for home in ("here", "there")]
    assert orders[0] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    assert named[0] == orders[0] and named[1] == orders[1]


def test_a_large_text_file_is_many_documents(tmp_path: Path) -> None:
    lines = [f"line {n} of a corpus in one file" for n in range(60_000)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    (tmp_path / "letter.txt").write_text("\n".join(lines[:1000]))
    texts = texts_of(local(tmp_path / "corpus.txt"))
    assert 10 < len(texts) < 40
    assert "\n".join(texts) == "\n".join(lines)
    assert len(texts_of(local(tmp_path / "letter.txt"))) == 1


def test_hub_datasets_through_a_local_copy(tmp_path: Path) -> None:
    """A folder laid out as a dataset repository stands in for the hub: the same resolution of files and splits."""
    for name in ("one", "two"):
        for n in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            pq.write_table(pa.table({"text": [f"{name} {n}"], "n": [n]}), tmp_path / name / f"train-{n}-of-3.parquet")
    configs = [{"config_name": n, "data_files": [{"split": "train", "path": f"{n}/train-*"}]} for n in ("one", "two")]
    (tmp_path / "README.md").write_text("---\n" + OmegaConf.to_yaml({"configs": configs}) + "---\n")
    source = SourceConfig(kind=SourceKind.hub, path=str(tmp_path), name="two")
    assert sorted(texts_of(source)) == ["two 0", "two 1", "two 2"]
    for change, message in (({"name": "three"}, "three"), ({"split": "dev"}, "train")):
        with pytest.raises(ValueError, match=message):
            texts_of(SourceConfig(kind=SourceKind.hub, path=str(tmp_path), **{"name": "two", **change}))


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="data.sources.corpus: cannot open the dataset org/none"):
        texts_of(SourceConfig(kind=SourceKind.hub, path="org/none"))


def test_hub_sample_reads_only_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code path of the hub: a stretch of each file in turn, the last file never; the same for two processes."""
    monkeypatch.setattr("data.sources.GROUP_BYTES", 1)  # each file a part, as large ones are
    texts = documents(3200)
    repository = tmp_path / "repo"
    repository.mkdir()
    for n in range(16):
        pq.write_table(pa.table({"text": texts[n::16]}), repository / f"train-{n}.parquet")
    source = SourceConfig(kind=SourceKind.hub, path=str(repository))
    last = list_parts("hub", source, seed=0)[-1]
    Path(last.files[0]).write_bytes(b"not to be read")
    shards = []
    for workers in (1, 2):
        config = make_config(tmp_path, {"hub": source}, name=f"w{workers}", num_workers=workers)
        sample(config)
        manifest = json.loads((Plan(config).sample.folder / "manifest.json").read_text())
        assert manifest["tokens"] == 6400
        shards.append(manifest["shards"])
    assert shards[0] == shards[1]
    with pytest.raises(ValueError, match="cannot read"):  # and the file would have been noticed
        sample(make_config(tmp_path, {"hub": source}, name="all", tokens=200_000))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"content": "x", "title": "y"}\n',
            "text_column=text: .*a.jsonl has no such column; it has content, title",
        ),
        ("a.jsonl", b"", "data.sources.corpus is empty"),
        ("a.jsonl", b'{"text": ""}\n', "data.sources.corpus is empty"),
        ("a.jsonl", b"this is not JSON\n", "cannot read .*a.jsonl"),
        ("a.jsonl", b'{"text": 3}\n', "cannot read .*a.jsonl: row 1: holds a number, not text"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:40], "cannot read .*a.jsonl.gz"),
        ("a.parquet", b"PAR1 no", "cannot read .*a.parquet"),
        ("a.txt", b"caf\xe9", "cannot read .*a.txt: holds the byte 0xe9, which is not UTF-8 there .character 4"),
        ("a.pdf", b"x", "no known format; known are .jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    config = make_config(tmp_path, {"corpus": local(tmp_path / name)})
    with pytest.raises(ValueError, match=message):
        open_sources(config, load_tokenizer(config))


def test_missing_parquet_column_and_missing_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="it has body"):
        texts_of(local(tmp_path / "a.parquet"))
    for pattern in (tmp_path / "none.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(ValueError, match="data.sources.corpus.data_files: nothing matches"):
            texts_of(local(pattern))
    config = make_config(tmp_path, {})
    with pytest.raises(ValueError, match="no text to sample"):
        open_sources(config, load_tokenizer(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.0}, r"data.fraction=0.0 must lie in \(0, 1\]"),
        ({"fraction": 1.5}, r"data.fraction=1.5 must lie in \(0, 1\]"),
        ({"validation_tokens": 0}, "data.validation_tokens"),
        ({"num_workers": 0}, "data.num_workers"),
        ({"files": ["a"], "sources": {"b": SourceConfig(data_files=["b"])}}, "choose one"),
        ({"sources": {"b": SourceConfig()}}, "data.sources.b.data_files is empty"),
        ({"sources": {"b": SourceConfig(data_files=["b"], path="c")}}, "path and name mean nothing"),
        ({"sources": {"b": SourceConfig(kind=SourceKind.hub)}}, "data.sources.b.path"),
        ({"sources": {"b": SourceConfig(kind=SourceKind.hub, path="c", data_files=["b"])}}, "data_files means nothing"),
        ({"sources": {"b": SourceConfig(kind=SourceKind.builtin, name="poems")}}, "prose, docstrings, code"),
        ({"sources": {"b": SourceConfig(data_files=["b"], weight=0)}}, "data.sources.b.weight"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)  # type: ignore[arg-type]


def test_shipped_data_groups_and_short_forms(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "conf"
    names = sorted(path.stem for path in (folder / "data").glob("*.yaml"))
    assert names == ["builtin", "chat", "local", "smollm"]
    with initialize_config_dir(str(folder), version_base="1.3"):
        weights = {
            name: [s.weight for s in typed_config(compose("config", [f"data={name}"])).data.sources.values()]
            for name in names
        }
        assert sum(weights["smollm"]) == pytest.approx(1) and len(weights["smollm"]) == 5
        assert sum(weights["builtin"]) == pytest.approx(1)
        one = typed_config(compose("config", ["data=local", "data.files=[x/*.gz]", "data.text_column=body"])).data
        assert one.sources == {"local": SourceConfig(data_files=["x/*.gz"], text_column="body")}
        mixed = compose("config", ["data=local", "+data.sources={a:{data_files:[x],weight:2},b:{data_files:[y]}}"])
        assert [source.weight for source in typed_config(mixed).data.sources.values()] == [2, 1]

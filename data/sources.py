"""Corpora as streams of texts: files on disk, datasets of the Hugging Face hub, the Python environment.

A source is listed as parts (a file, or a few small ones) in an order that depends on seed and file names
alone; each part is read by itself, by any process, through streaming `datasets`.

    local    JSON lines or arrays, Parquet: one document a row. Text files: one document a file; a text file
             above 1 MiB is taken for a whole corpus and cut at line ends into documents of about 100 kB.
             Compressed (.gz .bz2 .xz .zst) or not.
    hub      Any dataset that `datasets` reads as JSON, Parquet or text files; `path` may be a local copy.
    builtin  See data/builtin.py.
    generated  What the stage in data/converse.py has written.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any

import pyarrow as pa

from conf.plan import Plan
from conf.schema import Config, SourceConfig, SourceKind
from data import builtin
from data.chats import as_text, checked, require_template
from data.documents import name_rank

FORMATS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "json"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
GROUP_BYTES, GROUP_FILES = 4 << 20, 64  # small files that make one part
CORPUS_BYTES, CORPUS_DOCUMENT = 1 << 20, 100_000  # text files read as many documents


@dataclass(frozen=True)
class Part:
    """What one process reads in one go. `size` in bytes bounds the text in it; None where it is compressed."""

    source: str
    format: str
    files: tuple[str, ...]
    column: str
    chats: bool  # whether the column holds conversations
    size: int | None


def written_sources(config: Config, tokenizer: Any) -> dict[str, SourceConfig]:
    """The sources of a configuration, a generated one as the files that hold it; FileNotFoundError before they do,
    ValueError for conversations that the tokenizer cannot write."""
    for name, source in config.data.sources.items():
        if source.messages_column or source.kind is SourceKind.generated:
            require_template(tokenizer, f"data.sources.{name}")
    return {
        name: as_files(config, source) if source.kind is SourceKind.generated else source
        for name, source in config.data.sources.items()
    }


def as_files(config: Config, source: SourceConfig) -> SourceConfig:
    stage = Plan(config).converse
    stage.require_finished()
    files = [os.path.join(escape(str(stage.folder)), "*.jsonl")]
    return SourceConfig(weight=source.weight, data_files=files, messages_column="messages")


def list_parts(name: str, source: SourceConfig, seed: int) -> list[Part]:
    """All parts of a source, shuffled by seed and file names."""
    if source.kind is SourceKind.builtin:
        assert source.name, "checked by the schema"
        names = {file.path: file.name for file in builtin.environment_files()[source.name]}
        formats = dict.fromkeys(names, source.name)
    else:
        formats = local_files(name, source) if source.kind is SourceKind.local else hub_files(name, source)
        # The last two components: neither where a corpus lies nor which revision it is shall matter.
        names = {file: "/".join(file.split("/")[-2:]) for file in formats}
    shuffled = sorted(formats, key=lambda file: (name_rank(seed, names[file]), file))
    return list(grouped(name, source, formats, [(file, file_size(file)) for file in shuffled]))


def grouped(
    name: str, source: SourceConfig, formats: dict[str, str], sized: Iterable[tuple[str, int | None]]
) -> Iterator[Part]:
    open_groups: dict[str, list[tuple[str, int | None]]] = {}
    for path, size in sized:
        group = open_groups.setdefault(formats[path], [])
        if group and (size is None or sum(s or 0 for _, s in group) + size > GROUP_BYTES or len(group) >= GROUP_FILES):
            yield as_part(name, source, formats[path], group)
            open_groups[formats[path]] = group = []
        group.append((path, size))
    for format, group in open_groups.items():
        yield as_part(name, source, format, group)


def as_part(name: str, source: SourceConfig, format: str, group: list[tuple[str, int | None]]) -> Part:
    chats = source.messages_column is not None  # the template adds to what is in the file
    plain = not chats and format != "parquet" and not any(path.endswith(COMPRESSIONS) for path, _ in group)
    sizes = [size for _, size in group if size is not None]
    whole = sum(sizes) if plain and len(sizes) == len(group) else None
    column = source.messages_column or source.text_column
    return Part(name, format, tuple(path for path, _ in group), column, chats, whole)


def file_size(path: str) -> int | None:
    return os.stat(path).st_size if os.path.exists(path) else None


def local_files(name: str, source: SourceConfig) -> dict[str, str]:
    """Absolute path and format of every file that `data_files` means."""
    files: dict[str, str] = {}
    for pattern in source.data_files:
        expanded = os.path.abspath(os.path.expanduser(pattern))
        is_folder = os.path.isdir(expanded)
        if is_folder:
            matches = glob(os.path.join(escape(expanded), "**", "*"), recursive=True)
        else:
            matches = [expanded] if os.path.exists(expanded) else glob(expanded, recursive=True)
        found = {path: file_format(path) for path in matches if os.path.isfile(path)}
        if not found:
            raise ValueError(f"data.sources.{name}.data_files: nothing matches {pattern}")
        unknown = [path for path, format in found.items() if format is None]
        # In a folder other things may lie about; a file that was named is wanted.
        if len(unknown) == len(found) or (unknown and not is_folder):
            known = " ".join(FORMATS)
            raise ValueError(
                f"data.sources.{name}.data_files: {unknown[0]} has no known format; known are {known}, "
                f"also with {' '.join(COMPRESSIONS)}"
            )
        files |= {path: format for path, format in found.items() if format is not None}
    return files


def file_format(path: str) -> str | None:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    format = FORMATS.get(suffixes[-1]) if suffixes else None
    large = format == "text" and not path.endswith(COMPRESSIONS) and (file_size(path) or 0) > CORPUS_BYTES
    return "lines" if large else format


def hub_files(name: str, source: SourceConfig) -> dict[str, str]:
    """Address and format of every file of a dataset's split, as its repository declares them."""
    from datasets import load_dataset_builder

    assert source.path, "checked by the schema"
    try:
        builder = load_dataset_builder(source.path, source.name)
    except (OSError, ValueError) as error:  # not reachable, no such dataset, no such configuration
        raise ValueError(
            f"data.sources.{name}: cannot open the dataset {source.path} "
            f"(configuration {source.name or 'default'}): {error}"
        ) from error
    format = str(builder.info.builder_name)
    splits = builder.config.data_files or {}
    if format not in set(FORMATS.values()) or source.split not in splits:
        raise ValueError(
            f"data.sources.{name}: {source.path} has {format} files with splits {sorted(splits)}; "
            f"wanted are {sorted(set(FORMATS.values()))} files and the split {source.split}"
        )
    return {str(file): format for file in splits[source.split]}


def read_texts(part: Part) -> Iterator[str]:
    """The documents of a part, stripped, in file order; ValueError with the file's name where it cannot be read."""
    for file in part.files:
        try:
            for value in file_values(part, file):
                if part.chats:
                    messages = checked(value)
                    if messages:
                        yield as_text(messages)
                elif value and not value.isspace():
                    yield value.strip()
        except MissingColumn:
            raise
        except (OSError, EOFError, ValueError, RuntimeError, pa.ArrowException) as error:
            raise ValueError(f"data.sources.{part.source}: cannot read {file}: {error}") from error


class MissingColumn(ValueError):
    pass


def file_values(part: Part, file: str) -> Iterator[Any]:
    """Texts, or lists of messages; None where a row has none."""
    if part.format in builtin.CORPORA:
        yield from builtin.read_texts(part.format, file)
    elif part.chats and part.format in ("text", "lines"):
        raise ValueError("a text file holds no conversations; messages_column needs JSON lines or Parquet")
    elif part.format == "lines":
        yield from merged_lines(column_values("text", file, "text", 4096, sample_by="line", keep_linebreaks=True))
    elif part.format == "text":
        yield from column_values("text", file, "text", sample_by="document")
    else:
        if os.path.exists(file) and os.stat(file).st_size == 0:
            return
        require_column(part, file)
        options: dict[str, Any] = {"columns": [part.column]} if part.format == "parquet" else {}  # reads nothing else
        if part.chats:
            yield from conversations(part, file, **options)
        else:
            yield from column_values(part.format, file, part.column, **options)


def open_stream(format: str, file: str, **options: Any) -> Any:
    import datasets

    # Else every opening of a file asks the hub to count it, and waits seconds where there is no network.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    literal = escape(file) if os.path.exists(file) else file
    return datasets.load_dataset(format, data_files=[literal], split="train", streaming=True, **options)


def require_column(part: Part, file: str) -> None:
    stream = open_stream(part.format, file)
    columns = stream.column_names or list(next(iter(stream), {}))
    if columns and part.column not in columns:
        raise MissingColumn(
            f"data.sources.{part.source}.{column_option(part)}={part.column}: {file} has no such column; "
            f"it has {', '.join(columns)}"
        )


def column_option(part: Part) -> str:
    return "messages_column" if part.chats else "text_column"


def conversations(part: Part, file: str, **options: Any) -> Iterator[Any]:
    for row in open_stream(part.format, file, **options).select_columns([part.column]):
        yield row[part.column]


def column_values(format: str, file: str, column: str, batch: int = 64, **options: Any) -> Iterator[str | None]:
    stream = open_stream(format, file, **options)
    for table in stream.select_columns([column]).with_format("arrow").iter(batch):
        values = table.column(column)
        is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        if not is_text and values.null_count < len(values):
            raise ValueError(f"column {column} holds {values.type}, not text")
        yield from values.to_pylist()


def merged_lines(lines: Iterable[str | None]) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line or "")
        size += len(held[-1])
        if size >= CORPUS_DOCUMENT:
            yield "".join(held)
            held, size = [], 0
    yield "".join(held)

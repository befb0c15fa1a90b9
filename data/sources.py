"""Corpora as streams of texts: files on disk, datasets of the Hugging Face hub, the Python environment.

A source is listed as parts (a file, or a few small ones) in an order that depends on seed and file names
alone; each part is read by itself, by any process, as a stream. Of its rows only the wanted column is looked at;
rows without text are left out, and so are a few bad ones (data/skipped.py).

    local    JSON lines or arrays, Parquet: one document a row. Text files: one document a file; a text file
             above 1 MiB is taken for a whole corpus and cut at line ends into documents of about 100 kB.
             Compressed (.gz .bz2 .xz .zst) or not.
    hub      Any dataset that `datasets` reads as JSON, Parquet or text files; `path` may be a local copy.
    builtin  See data/builtin.py.
    generated  What the stage in data/converse.py has written.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any

from conf.errors import one_line
from conf.plan import Plan
from conf.schema import Config, SourceConfig, SourceKind
from data import builtin
from data.chats import as_text, checked, require_template
from data.documents import name_rank
from data.opening import READ_ERRORS, is_compressed, plain, text_of, valid
from data.rows import BadRow, MissingColumn, Row, json_rows, kind, parquet_rows, text_lines
from data.skipped import FileRows, Skipped

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
    as_it_is = not chats and format != "parquet" and not any(compressed(path) for path, _ in group)
    sizes = [size for _, size in group if size is not None]
    whole = sum(sizes) if as_it_is and len(sizes) == len(group) else None
    column = source.messages_column or source.text_column
    return Part(name, format, tuple(path for path, _ in group), column, chats, whole)


def file_size(path: str) -> int | None:
    return os.stat(path).st_size if os.path.exists(path) else None


def compressed(path: str) -> bool:
    """By its content where it lies here, for names say otherwise or nothing."""
    return is_compressed(path) if os.path.exists(path) else path.lower().endswith(COMPRESSIONS)


def local_files(name: str, source: SourceConfig) -> dict[str, str]:
    """Absolute path and format of every file that `data_files` means."""
    files: dict[str, str] = {}
    for pattern in source.data_files:
        if not pattern.strip():
            raise ValueError(f"data.sources.{name}.data_files: {source.data_files} has an empty entry")
        expanded = os.path.abspath(os.path.expanduser(pattern))
        is_folder = os.path.isdir(expanded)
        if is_folder:
            matches = glob(os.path.join(escape(expanded), "**", "*"), recursive=True)
        else:
            matches = [expanded] if os.path.exists(expanded) else glob(expanded, recursive=True)
        found = {path: file_format(path) for path in matches if os.path.isfile(path)}
        if not found:
            what = f"there are no files in {pattern}" if is_folder else f"nothing matches {pattern}"
            raise ValueError(f"data.sources.{name}.data_files: {what}")
        unknown = [path for path, format in found.items() if format is None]
        # In a folder other things may lie about; a file that was named is wanted.
        if len(unknown) == len(found) or (unknown and not is_folder):
            known = " ".join(FORMATS)
            raise ValueError(
                f"data.sources.{name}.data_files: {unknown[0]} has no known format; known are {known}, "
                f"also with {' '.join(COMPRESSIONS)}"
            )
        files |= {path: format for path, format in found.items() if format is not None}
    for path in files:
        try:
            valid(path)
        except ValueError as error:
            raise ValueError(f"data.sources.{name}.data_files: the name {path!r} {error}; rename the file") from None
    return files


def file_format(path: str) -> str | None:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    format = FORMATS.get(suffixes[-1]) if suffixes else None
    large = format == "text" and (file_size(path) or 0) > CORPUS_BYTES and not compressed(path)
    return "lines" if large else format


def hub_files(name: str, source: SourceConfig) -> dict[str, str]:
    """Address and format of every file of a dataset's split, as its repository declares them."""
    from datasets import load_dataset_builder

    assert source.path, "checked by the schema"
    try:
        builder = load_dataset_builder(source.path, source.name)
    except Exception as error:  # not reachable, no such dataset or configuration, or whatever its own files lead to
        raise ValueError(
            f"data.sources.{name}: cannot open the dataset {source.path} "
            f"(configuration {source.name or 'default'}): {one_line(error)}"
        ) from error
    format = str(builder.info.builder_name)
    splits = builder.config.data_files or {}
    if format not in set(FORMATS.values()) or source.split not in splits:
        raise ValueError(
            f"data.sources.{name}: {source.path} has {format} files with splits {sorted(splits)}; "
            f"wanted are {sorted(set(FORMATS.values()))} files and the split {source.split}"
        )
    return {member: format for file in splits[source.split] for member in unpacked(str(file))}


def unpacked(file: str) -> list[str]:
    """The addresses of the files in a zip file; any other file is its own."""
    if not file.lower().endswith(".zip"):
        return [file]
    from datasets import StreamingDownloadManager

    manager = StreamingDownloadManager()
    return list(manager.iter_files([manager.extract(file)]))


def read_texts(part: Part, skipped: Skipped | None = None) -> Iterator[str]:
    """The documents of a part, stripped, in file order; what is left out is counted in `skipped`.

    ValueError with the names of source and file, and the row's number, where a file cannot be read.
    """
    for file in part.files:
        try:
            if part.format in builtin.CORPORA:
                yield from not_blank(builtin.read_texts(part.format, file))
            else:
                yield from file_texts(part, file, FileRows(file, Skipped() if skipped is None else skipped))
        except MissingColumn as error:
            option = "messages_column" if part.chats else "text_column"
            raise ValueError(f"data.sources.{part.source}.{option}={part.column}: {file} has {error}") from None
        except READ_ERRORS as error:
            raise ValueError(f"data.sources.{part.source}: cannot read {file}: {one_line(error)}") from error


def file_texts(part: Part, file: str, counted: FileRows) -> Iterator[str]:
    if part.chats:
        if part.format in ("text", "lines"):
            raise ValueError("a text file holds no conversations; messages_column needs JSON lines or Parquet")
        return documents(file_rows(part, file), conversation, counted)
    if part.format == "lines":
        return not_blank(merged_lines(documents(text_lines(file), plain, counted)))
    if part.format == "text":
        return documents(enumerate([text_of(file)], 1), text_cell, counted)
    return documents(file_rows(part, file), text_cell, counted)


def file_rows(part: Part, file: str) -> Iterator[Row]:
    return (parquet_rows if part.format == "parquet" else json_rows)(file, part.column)


def documents(rows: Iterable[Row], take: Callable[[Any], str | None], counted: FileRows) -> Iterator[str]:
    """What `take` makes of the rows; it raises ValueError for a bad one and says None to one that holds nothing."""
    for number, value in rows:
        try:
            if isinstance(value, BadRow):
                raise value
            text = take(value)
        except ValueError as error:
            counted.leave_bad(f"row {number:,}: {error}")
            continue
        if text is None:
            counted.leave_empty()
        else:
            counted.good += 1
            yield text
    counted.close()


def text_cell(value: Any) -> str | None:
    """A row's text; None where it has none."""
    if isinstance(value, bytes):  # some writers of Parquet do not say that their bytes are text
        value = value.decode("utf-8", "surrogateescape")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"holds {kind(value)}, not text")
    return valid(value).strip() if value and not value.isspace() else None


def not_blank(texts: Iterable[str]) -> Iterator[str]:
    return (text.strip() for text in texts if text and not text.isspace())


def conversation(value: Any) -> str | None:
    messages = checked(value)
    return as_text(messages) if messages else None


def merged_lines(lines: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= CORPUS_DOCUMENT:
            yield "".join(held)
            held, size = [], 0
    yield "".join(held)

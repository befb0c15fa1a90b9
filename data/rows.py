"""The rows of a file, one column of them: JSON in whatever arrangement, Parquet, lines of text.

Rows come with their numbers, counted from 1 (of JSON lines those of the lines). A row that cannot be had comes as
a `BadRow`, and those behind it still do; an error is raised where the file as a whole cannot be read on.

JSON is decoded row by row, so what stands in other fields does not matter, nor whether rows agree in it. Three
arrangements are told apart by how they begin: a row a line, an array, rows spelled out over several lines.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from data.opening import opened, opened_text

HEAD = 1 << 16  # characters read at once, and looked at to tell arrangements apart
NEVER = 100_000  # rows without the column after which it is not looked for any further
BATCH = 256  # rows of Parquet
BETWEEN = " \t\r\n,"  # what stands between rows
DECODER = json.JSONDecoder(strict=False)  # not strict: tabs and the like may stand in strings as they are


class BadRow(ValueError):
    """A row that does not hold what is wanted."""


class MissingColumn(ValueError):
    """No row of a file has the column. `columns` are those that it has."""

    def __init__(self, columns: Iterable[str]):
        self.columns = list(columns)
        super().__init__(f"no such column; it has {listed(self.columns)}")


Row = tuple[int, Any]  # number; the column's value, None where the row has none, or BadRow
Spelled = tuple[int, Any, str]  # number, the whole row or BadRow, and how it is written


def json_rows(file: str, column: str) -> Iterator[Row]:
    """Raises MissingColumn where no row has the column, ValueError for an array that is no JSON."""
    with opened_text(file, newline="\n") as stream:
        yield from cells(whole_rows(stream), column)


def whole_rows(stream: TextIO) -> Iterator[Spelled]:
    """Rows of JSON with all their fields, in whatever arrangement."""
    head = stream.read(HEAD)
    if is_spelled_out(head.lstrip()):
        return spelled_out(Text(stream, head))
    return row_a_line(chain(io.StringIO(head + stream.readline(), newline="\n"), stream))


def is_spelled_out(start: str) -> bool:
    """Whether a file that starts so is an array of objects, or has an object that goes on in the next line."""
    line, _, behind = start.partition("\n")
    is_array = re.match(r"\[\s*[{\]]", start) is not None
    try:
        DECODER.decode(line)
    except json.JSONDecodeError as error:
        return is_array or (bool(behind) and line.startswith("{") and error.pos >= len(line.rstrip()))
    except (ValueError, RecursionError):
        return is_array
    return is_array and not behind.strip()


def row_a_line(lines: Iterable[str]) -> Iterator[Spelled]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            yield number, DECODER.decode(line), line
        except json.JSONDecodeError as error:
            yield number, BadRow(f"is not JSON: {error.msg} at character {error.pos + 1:,}"), line
        except RecursionError:
            yield number, BadRow("is nested too deep"), line
        except ValueError as error:  # a number of thousands of digits
            yield number, BadRow(f"is not JSON that can be read: {error}"), line


def spelled_out(text: "Text") -> Iterator[Spelled]:
    """The elements of an array, or objects one behind the other."""
    is_array = text.next_mark() == "["
    text.at += is_array
    number = 0
    while (mark := text.next_mark()) and not (is_array and mark == "]"):
        number += 1
        yield number, *text.value(number)
    if is_array and not mark:
        raise ValueError(f"ends in the midst of its array, behind row {number}")
    text.at += is_array
    if text.next_mark():
        raise ValueError(f"goes on behind its array of {number} rows")


class Text:
    """A stream of characters of which only the part at hand is held."""

    def __init__(self, stream: TextIO, held: str):
        self.stream, self.held, self.at = stream, held, 0

    def more(self) -> bool:
        """Read on, as much again as is held and not yet used; False at the end."""
        rest = self.held[self.at :]
        piece = self.stream.read(max(HEAD, len(rest)))
        self.held, self.at = rest + piece, 0
        return bool(piece)

    def next_mark(self) -> str:
        """The next character that is not BETWEEN rows; empty at the end."""
        while True:
            while self.at < len(self.held) and self.held[self.at] in BETWEEN:
                self.at += 1
            if self.at < len(self.held):
                return self.held[self.at]
            if not self.more():
                return ""

    def value(self, number: int) -> tuple[Any, str]:
        """The JSON value that begins here, and how it is written."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.held, self.at)
            except json.JSONDecodeError as error:
                if self.cut_off(error) and self.more():
                    continue
                raise ValueError(f"row {number} is not JSON: {error.msg}") from None
            except RecursionError:
                raise ValueError(f"row {number} is nested too deep") from None
            if end < len(self.held) or not self.more():  # else what was read may be half a number
                spelling, self.at = self.held[self.at : end], end
                return value, spelling

    def cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether an error may come from the end of what is held, rather than from what is written."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self.held) - 16


def cells(rows: Iterable[Spelled], column: str) -> Iterator[Row]:
    """One field of each row; MissingColumn if there are objects but none of them has it."""
    columns: Iterable[str] = ()
    found = False
    for count, (number, row, spelling) in enumerate(rows, 1):
        if isinstance(row, BadRow):
            yield number, row
        elif not isinstance(row, dict):
            yield number, BadRow(f"is {kind(row)}, not an object with the field {column}")
        elif column in row:
            found = True
            yield number, BadRow(f"has {column} more than once") if ambiguous(spelling, column) else row[column]
        else:
            columns = columns or list(row) or ["no fields"]
            if not found and count >= NEVER:
                break
            yield number, None
    if columns and not found:
        raise MissingColumn(columns)


def ambiguous(spelling: str, column: str) -> bool:
    """Whether an object gives two values for one field."""
    if spelling.count(json.dumps(column)) < 2:  # seldom more, so the rest may take its time
        return False
    pairs = json.JSONDecoder(strict=False, object_pairs_hook=list).decode(spelling)
    values = [value for name, value in pairs if name == column]
    return any(value != values[0] for value in values)


def listed(names: Iterable[str]) -> str:
    """Names of fields in a line that can be printed, whatever they hold."""
    return ", ".join(name if name.isprintable() and name else ascii(name) for name in names)[:300]


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def parquet_rows(file: str, column: str) -> Iterator[Row]:
    """Raises MissingColumn; ArrowInvalid for a file that is no Parquet."""
    with opened(file) as stream:
        if not stream.peek(1):
            return
        table = pq.ParquetFile(
            stream if stream.seekable() else pa.BufferReader(stream.read()), page_checksum_verification=True
        )
        names = table.schema_arrow.names
        if table.metadata.num_rows and column not in names:
            raise MissingColumn(names)
        if names.count(column) > 1:
            raise ValueError(f"has the column {column} more than once")
        batches = table.iter_batches(BATCH, columns=[column], use_threads=False)
        yield from enumerate((cell for batch in batches for cell in arrow_cells(batch.column(column))), 1)


def arrow_cells(values: pa.Array) -> list[Any]:
    try:
        return values.to_pylist()
    except (ValueError, OverflowError):  # some cell is no UTF-8, or has no counterpart in Python
        return [arrow_cell(value) for value in values]


def arrow_cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError) as error:
        return BadRow(f"cannot be read: {error}")


def text_lines(file: str) -> Iterator[Row]:
    """Lines of a text with their ends, as \\n."""
    with opened_text(file) as stream:
        yield from enumerate(stream, 1)

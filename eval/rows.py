"""Rows of LongBench's form, checked before any model is loaded: one that cannot be scored is named with its place.

What clearly means the same is taken for it: one answer that is no list, a whole number where its digits are wanted.
No row is left out, for then a score would be of something else.
"""

import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from conf.errors import one_line
from data.opening import READ_ERRORS, buffered, decoded, opened_text, valid
from data.rows import BadRow, Spelled, ambiguous, kind, listed, whole_rows
from eval.tasks import Row

REQUIRED = ("_id", "input", "context", "answers", "all_classes")


def rows_of_file(file: Path) -> Iterator[Spelled]:
    """All rows of a file of JSON; ValueError that names it where it cannot be read."""
    try:
        with opened_text(str(file), newline="\n") as stream:
            yield from whole_rows(stream)
    except READ_ERRORS as error:
        raise ValueError(f"cannot read {file}: {one_line(error)}") from error


def rows_of_member(file: Path, member: str) -> Iterator[Spelled]:
    """The same of a file in a zip file."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(member) as raw, buffered(raw) as stream:
            yield from whole_rows(decoded(stream, newline="\n"))
    except READ_ERRORS as error:
        raise ValueError(f"cannot read {file}:{member}: {one_line(error)}") from error


def members_of(file: Path) -> list[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except READ_ERRORS as error:
        raise ValueError(f"cannot read {file}: {one_line(error)}") from error


def checked_rows(
    rows: Iterable[Spelled], name: str, columns: tuple[str, ...], take: Callable[[Row], Row], before: str = ":"
) -> list[Row]:
    """What `take` makes of all rows; ValueError with the place (name, `before`, number) of one that lacks a column or
    that it refuses."""
    found = []
    for number, row, spelling in rows:
        try:
            require(row, spelling, columns)
            found.append(take(row))
        except ValueError as error:
            raise ValueError(f"{name}{before}{number} {error}") from None
    if not found:
        raise ValueError(f"{name} holds no rows")
    return found


def require(row: Any, spelling: str, columns: tuple[str, ...]) -> None:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"is {kind(row)}, not an object with the fields {', '.join(columns)}")
    missing = [column for column in columns if column not in row]
    if missing:
        raise ValueError(
            f"lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"a row of LongBench's form has {', '.join(columns)}; this one has {listed(row) or 'none'}"
        )
    for column in columns:
        if ambiguous(spelling, column):
            raise ValueError(f"has {column} more than once")


def longbench_row(row: Row) -> Row:
    """The fields that prompts and scorers read. Tasks without a question have an empty one, or null."""
    return {
        "_id": text(row, "_id"),
        "input": "" if row["input"] is None else text(row, "input"),
        "context": text(row, "context"),
        "answers": answers(row["answers"]),
        "all_classes": row["all_classes"],
    }


def text(row: Row, column: str) -> str:
    return as_text(row[column], column)


def as_text(value: Any, column: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"has {kind(value)} as {column}, not text")
    try:
        return valid(value)
    except ValueError as error:
        raise ValueError(f"{error} in {column}") from None


def answers(value: Any) -> list[str]:
    """The right answers, of which an output has to meet one."""
    if not isinstance(value, list):
        value = [value]
    if not value:
        raise ValueError("has no answers: a list of at least one text is wanted")
    return [as_text(each, "answers") for each in value]

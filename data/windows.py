"""A text in windows of tokens that stand alone: what perplexities of a text are measured on."""

from pathlib import Path
from typing import Any, TextIO

import torch

from conf.errors import one_line
from data.opening import READ_ERRORS, opened_text, plain
from data.sources import file_format
from data.tokens import plain_ids

SEAM = 1024  # tokens before the end of what was read of a text: they may be others when more is read
CHARACTERS_PER_TOKEN = 6  # read at first for each wanted token


def text_windows(tokenizer: Any, file: Path, length: int, tokens: int) -> list[torch.Tensor]:
    """The first `tokens` tokens of a text file in consecutive windows of `length`; the rest of it is not read.

    ValueError where it is no text, or too short."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    if file_format(str(file)) in ("json", "parquet"):
        raise ValueError(f"{file} has rows, and a plain text file is wanted: write its texts to one")
    try:
        with opened_text(str(file)) as stream:
            ids = first_ids(tokenizer, stream, tokens)
    except READ_ERRORS as error:
        raise ValueError(f"cannot read {file}: {one_line(error)}") from error
    count = min(tokens, len(ids)) // length
    if not count:
        raise ValueError(f"{file} has {len(ids)} tokens, less than a window of {length}")
    return list(torch.tensor(ids[: count * length]).view(count, length))


def first_ids(tokenizer: Any, stream: TextIO, tokens: int) -> list[int]:
    """Ids of a text, the first `tokens` of them as they are with the whole of it, or all if there are fewer."""
    text, missing = "", (tokens + SEAM) * CHARACTERS_PER_TOKEN
    while True:
        more = plain(stream.read(missing))
        text += more
        ids: list[int] = plain_ids(tokenizer, text)
        if len(ids) >= tokens + SEAM or len(more) < missing:
            return ids
        missing = len(text)

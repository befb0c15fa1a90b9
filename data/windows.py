"""A text in windows of tokens that stand alone: what perplexities of a text are measured on."""

from pathlib import Path
from typing import Any

import torch

from data.opening import READ_ERRORS, one_line, text_of
from data.sources import file_format
from data.tokens import plain_ids


def text_windows(tokenizer: Any, file: Path, length: int, tokens: int) -> list[torch.Tensor]:
    """The first `tokens` tokens of a text file in consecutive windows of `length`; ValueError where it is no text."""
    ids = plain_ids(tokenizer, plain_text(file))
    count = min(tokens, len(ids)) // length
    if not count:
        raise ValueError(f"{file} has {len(ids)} tokens, less than a window of {length}")
    return list(torch.tensor(ids[: count * length]).view(count, length))


def plain_text(file: Path) -> str:
    """A text file as it is, which may be compressed."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    if file_format(str(file)) in ("json", "parquet"):
        raise ValueError(f"{file} has rows, and a plain text file is wanted: write its texts to one")
    try:
        return text_of(str(file))
    except READ_ERRORS as error:
        raise ValueError(f"cannot read {file}: {one_line(error)}") from error

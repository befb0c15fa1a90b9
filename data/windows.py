"""A text in windows of tokens that stand alone: what perplexities of a text are measured on."""

from pathlib import Path
from typing import Any, TextIO

import torch

SEAM = 1024  # tokens before the end of what was read of a text: they may be others when more is read
CHARACTERS_PER_TOKEN = 6  # read at first for each wanted token


def text_windows(tokenizer: Any, file: Path, length: int, tokens: int) -> list[torch.Tensor]:
    """The first `tokens` tokens of a text file in consecutive windows of `length`; the rest of it is not read."""
    with file.open(encoding="utf-8") as stream:
        ids = first_ids(tokenizer, stream, tokens)
    count = min(tokens, len(ids)) // length
    if not count:
        raise ValueError(f"{file} has {len(ids)} tokens, less than a window of {length}")
    return list(torch.tensor(ids[: count * length]).view(count, length))


def first_ids(tokenizer: Any, stream: TextIO, tokens: int) -> list[int]:
    """Ids of a text, the first `tokens` of them as they are with the whole of it, or all if there are fewer."""
    text, missing = "", (tokens + SEAM) * CHARACTERS_PER_TOKEN
    while True:
        more = stream.read(missing)
        text += more
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens + SEAM or len(more) < missing:
            return ids
        missing = len(text)

"""A text in windows of tokens that stand alone: what perplexities of a text are measured on."""

from pathlib import Path
from typing import Any

import torch

from data.tokens import plain_ids


def text_windows(tokenizer: Any, file: Path, length: int, tokens: int) -> list[torch.Tensor]:
    """The first `tokens` tokens of a text file in consecutive windows of `length`."""
    ids = plain_ids(tokenizer, file.read_text(encoding="utf-8"))
    count = min(tokens, len(ids)) // length
    if not count:
        raise ValueError(f"{file} has {len(ids)} tokens, less than a window of {length}")
    return list(torch.tensor(ids[: count * length]).view(count, length))

"""Perplexity over windows of tokens: exp of the mean loss per predicted token.

Each window stands alone: its first token is given and predicted by nothing. Windows of a text are
consecutive and made without special tokens; windows of packed training rows end where a document ends,
so that no token is predicted from another document.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from pyarrow import dataset

from mha2mla.output_head import IGNORED, next_token_losses, perplexity_of

FORWARD_TOKENS = 2048  # tokens of a forward pass, padding included
SHORTEST = 16  # shorter pieces of documents are left out: they measure the first words of a text


def perplexity(model: Any, windows: Sequence[torch.Tensor], on_tokens: Callable[[int], None] | None = None) -> float:
    """exp of the mean loss over all windows' predicted tokens; `windows` are 1-D ids of any lengths ≥ 2.

    inf where the exp is too large for a number; NaN, with a warning, where the model's logits are.

    `on_tokens` is told how many tokens each forward pass has taken.
    """
    total, count = 0.0, 0
    with torch.inference_mode():
        for group in grouped(windows):
            loss, tokens = batch_loss(model, group)
            total, count = total + loss, count + tokens
            if on_tokens:
                on_tokens(sum(len(window) for window in group))
    if not count:
        raise ValueError("perplexity needs at least one window of two tokens")
    return perplexity_of(total / count)


def grouped(windows: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Windows of similar length together, FORWARD_TOKENS a group or a single window."""
    group: list[torch.Tensor] = []
    for window in sorted(windows, key=len, reverse=True):
        if group and (len(group) + 1) * len(group[0]) > FORWARD_TOKENS:
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def padded(windows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels [B, T] of windows, the longest first, padded on the right, where nothing looks back at it."""
    length = len(windows[0])
    ids = torch.zeros(len(windows), length, dtype=torch.long)
    labels = torch.full((len(windows), length), IGNORED)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window
        labels[row, : len(window) - 1] = window[1:]
    return ids, labels


def batch_loss(model: Any, windows: list[torch.Tensor]) -> tuple[float, int]:
    """Summed loss and number of predicted tokens of windows in one forward."""
    ids, labels = padded(windows)
    loss = next_token_losses(model, ids, labels).double().sum().item()
    return loss, int((labels != IGNORED).sum())


def packed_windows(folder: Path, length: int, tokens: int) -> list[torch.Tensor]:
    """Windows of at most `length` from the sampled validation split, about `tokens` tokens in all.

    The rows taken are spread evenly over the split, whose documents may lie there source by source.
    """
    files = sorted(folder.glob("validation-*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no validation-*.parquet")
    split, columns = dataset.dataset(files, format="parquet"), ["input_ids", "position_ids"]
    rows = split.count_rows()
    row_tokens = max(len(split.head(1, columns=columns)["input_ids"][0]), 1)
    wanted = min(max(round(tokens / row_tokens), 1), rows)
    places = numpy.linspace(0, rows - 1, wanted).round().astype(int)
    pieces: list[torch.Tensor] = []
    for row in split.take(places, columns=columns).to_pylist():
        pieces += document_windows(torch.tensor(row["input_ids"]), torch.tensor(row["position_ids"]), length)
    if not pieces:
        raise ValueError(f"{folder}: no document of the validation split has {SHORTEST} tokens")
    return pieces


def document_windows(ids: torch.Tensor, positions: torch.Tensor, length: int) -> list[torch.Tensor]:
    """One packed row cut where positions restart, then every `length` tokens."""
    starts = (torch.nonzero(positions[1:] != positions[:-1] + 1).flatten() + 1).tolist()
    bounds = [0, *starts, len(ids)]
    pieces = [piece for a, b in zip(bounds, bounds[1:], strict=False) for piece in ids[a:b].split(length)]
    return [piece for piece in pieces if len(piece) >= SHORTEST]

"""Packed sequences from the sampled shards, in an order that depends on seed and step alone.

The order is one list of rows: a permutation of all rows for every epoch, one after the other. Optimiser step s
takes rows [s*B, (s+1)*B) of it, B being the global batch size. Every process reads that same global batch and
trains on its share, so the number of processes changes nothing and resuming needs only the step.
A last batch that would not be full is dropped.

Shapes: B sequences of T tokens. `position_ids` restart at 0 where a packed document starts.
"""

from functools import lru_cache
from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import load_dataset
from torch import Tensor

from train.targets import IGNORE, Batch

COLUMNS = ("input_ids", "position_ids")


class PackedRows:
    """The rows of one split (`train` or `validation`), memory-mapped: `len`, `.length` (T) and `.batch(indices)`."""

    def __init__(self, folder: Path, split: str, vocab_size: int):
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if not sum(pq.read_metadata(file).num_rows for file in files):
            raise ValueError(
                f"{folder} holds no rows of the split '{split}' ({len(files)} files {split}-*.parquet); "
                "run `make sample` again with more data.tokens (data.validation_tokens for validation)"
            )
        for file in files:
            check_shard(file, vocab_size)
        # `datasets` unpacks Parquet once into an Arrow file that all processes map, kept beside the shards.
        names = [str(file) for file in files]
        rows = load_dataset("parquet", data_files={split: names}, split=split, cache_dir=str(folder / "cache"))
        self.rows = rows.select_columns(list(COLUMNS)).with_format("torch")
        self.length = len(self.rows[0]["input_ids"])

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: list[int]) -> Batch:
        """`input_ids`, `position_ids` and `labels`, each int64 [len(indices), T]."""
        batch = {name: column.long() for name, column in self.rows[indices].items()}
        return batch | {"labels": next_tokens(**batch)}


class TextRows:
    """A text in windows of T tokens that stand alone, int64 [N, T]: what a curve of perplexity is measured on."""

    def __init__(self, name: str, windows: Tensor):
        self.name, self.windows = name, windows

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, indices: list[int]) -> Batch:
        """As `PackedRows.batch`."""
        ids = self.windows[indices]
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return {"input_ids": ids, "position_ids": positions, "labels": next_tokens(ids, positions)}


def check_shard(file: Path, vocab_size: int) -> None:
    """Columns and largest token id of a shard, from its footer where the writer left statistics."""
    metadata = pq.read_metadata(file)
    missing = set(COLUMNS) - set(pq.read_schema(file).names)
    if missing:
        raise ValueError(f"{file} lacks the columns {sorted(missing)}; make the shards with `python -m data.sample`")
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    column = next(i for i, path in enumerate(paths) if path.split(".")[0] == "input_ids")
    largest = -1
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(column).statistics
        if statistics is not None and statistics.has_min_max:
            largest = max(largest, statistics.max)
        else:
            tokens = pq.ParquetFile(file).read_row_group(group, columns=["input_ids"]).column(0).combine_chunks()
            largest = max(largest, int(tokens.flatten().to_numpy(zero_copy_only=False).max(initial=-1)))
    if largest >= vocab_size:
        raise ValueError(
            f"{file} holds the token id {largest}, but the model has {vocab_size} tokens: the data were made with "
            "another tokenizer; run `make sample` for this model"
        )


def next_tokens(input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Labels aligned with the logits: the next token, IGNORE where that starts another document or the row ends."""
    labels = torch.full_like(input_ids, IGNORE)
    labels[:, :-1] = input_ids[:, 1:].masked_fill(position_ids[:, 1:] == 0, IGNORE)
    return labels


class TrainingOrder:
    """`len(order)` full global batches; `order.rows(step)` lists the rows of one."""

    def __init__(self, rows: int, batch_size: int, epochs: int, seed: int):
        self.total, self.batch_size, self.epochs, self.seed = rows, batch_size, epochs, seed

    def __len__(self) -> int:
        return self.total * self.epochs // self.batch_size

    def rows(self, step: int) -> list[int]:
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(permutation(self.total, self.seed, p // self.total)[p % self.total]) for p in places]


@lru_cache(maxsize=2)
def permutation(rows: int, seed: int, epoch: int) -> Tensor:
    """The order of the rows in one epoch, int64 [rows]."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(mix_seed(seed, epoch)))


def micro_batch(batch: Batch, index: int, size: int, device: torch.device) -> Batch:
    """Rows [index * size, (index + 1) * size) of a batch, on the device."""
    return {name: rows[index * size : (index + 1) * size].to(device) for name, rows in batch.items()}


def mix_seed(*numbers: int) -> int:
    """One seed from several numbers: the same everywhere, different for (0, 1) and (1, 0)."""
    value = 0
    for number in numbers:
        value = (value * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return value

"""Packing: documents end to end into rows of one length, written as Parquet shards.

`position_ids` start at 0 at each document's first token and at each row's start. That is how document
boundaries are kept: from such positions transformers makes attention block-diagonal, and the trainer masks
the label of a document's first token.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BLOCK = 256  # rows packed at once, and rows per row group
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("position_ids", pa.list_(pa.int32()))])


def pack(documents: Iterable[np.ndarray], length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """input_ids and position_ids, int32 `[rows, length]`, at most BLOCK rows at once; an unfilled row is dropped."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    size = 0
    for tokens in documents:
        ids.append(tokens)
        positions.append(np.arange(len(tokens), dtype=np.int32))
        size += len(tokens)
        if size >= BLOCK * length:
            flat_ids, flat_positions = np.concatenate(ids), np.concatenate(positions)
            whole = size // (BLOCK * length) * BLOCK * length
            for start in range(0, whole, BLOCK * length):
                block = slice(start, start + BLOCK * length)
                yield as_rows(flat_ids[block], flat_positions[block], length)
            ids, positions, size = [flat_ids[whole:]], [flat_positions[whole:]], size - whole
    whole = size // length * length
    if whole:
        yield as_rows(np.concatenate(ids)[:whole], np.concatenate(positions)[:whole], length)


def as_rows(ids: np.ndarray, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    in_row = np.arange(length, dtype=np.int32)
    # A document that began in an earlier row is further on than its place in this row.
    return ids.reshape(-1, length), np.minimum(positions.reshape(-1, length), in_row)


def write_shards(
    documents: Iterable[np.ndarray], rows: int, length: int, rows_per_shard: int, folder: Path, side: str
) -> list[Path]:
    """Write `rows` rows as `<side>-00000-of-000NN.parquet`; the number of shards must be known for their names."""
    count = -(-rows // rows_per_shard)
    paths = [folder / f"{side}-{number:05d}-of-{count:05d}.parquet" for number in range(count)]
    blocks = one_by_one(pack(documents, length), rows_per_shard)
    for path in paths:
        left = min(rows_per_shard, rows)
        rows -= left
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            while left:
                block = next(blocks)
                writer.write_table(as_table(*block), row_group_size=BLOCK)
                left -= len(block[0])
    assert next(blocks, None) is None, "more rows than announced"
    return paths


def one_by_one(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], rows_per_shard: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut blocks of rows where a shard ends."""
    room = rows_per_shard
    for ids, positions in blocks:
        while len(ids):
            yield ids[:room], positions[:room]
            used = min(room, len(ids))
            ids, positions, room = ids[used:], positions[used:], room - used or rows_per_shard


def as_table(*columns: np.ndarray) -> pa.Table:
    return pa.table([as_lists(rows) for rows in columns], schema=SCHEMA)


def as_lists(rows: np.ndarray) -> pa.ListArray:
    count, length = rows.shape
    offsets = pa.array(np.arange(0, (count + 1) * length, length, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1), pa.int32()))

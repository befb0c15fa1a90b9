"""External merge sort: sort more records than memory holds by writing sorted runs and merging them.

A record is (key, source, payload): a hash, the number of its source, and bytes (UTF-8 text or int32 tokens).
Runs are Arrow files; merging keeps one small batch of each in memory.
"""

import heapq
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

RUN_BYTES = 64 << 20  # payload held in memory before a run is written
BATCH_BYTES = 128 << 10  # payload per batch of a run
SCHEMA = pa.schema([("key", pa.binary()), ("source", pa.int16()), ("payload", pa.large_binary())])


class Record(NamedTuple):
    key: bytes
    source: int
    payload: bytes


class RunWriter:
    """Collects records and writes `<prefix>-<n>.arrow`, each sorted; `close` returns all paths."""

    def __init__(self, prefix: Path, run_bytes: int = RUN_BYTES):
        self.prefix, self.run_bytes = prefix, run_bytes
        self.paths: list[str] = []
        self._held: list[Record] = []
        self._bytes = 0

    def add(self, record: Record) -> None:
        self._held.append(record)
        self._bytes += len(record.payload)
        if self._bytes >= self.run_bytes:
            self._write()

    def close(self) -> list[str]:
        if self._held:
            self._write()
        return self.paths

    def _write(self) -> None:
        self._held.sort(key=order)
        path = f"{self.prefix}-{len(self.paths):05d}.arrow"
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            start, size = 0, 0
            for end, record in enumerate(self._held, 1):
                size += len(record.payload)
                if size >= BATCH_BYTES or end == len(self._held):
                    writer.write_batch(as_batch(self._held[start:end]))
                    start, size = end, 0
        self.paths.append(path)
        self._held, self._bytes = [], 0


def order(record: Record) -> tuple[bytes, int]:
    return record.key, record.source


def as_batch(records: list[Record]) -> pa.RecordBatch:
    columns = zip(SCHEMA, zip(*records, strict=True), strict=True)
    return pa.record_batch([pa.array(column, field.type) for field, column in columns], schema=SCHEMA)


def read_run(path: str) -> Iterator[Record]:
    """Records of one run. The file is opened anew for each batch: there may be more runs than file handles."""
    index, count = 0, 1
    while index < count:
        with pa.OSFile(path, "rb") as file:
            reader = pa.ipc.open_file(file)
            count = reader.num_record_batches
            batch = reader.get_batch(index)
        yield from map(Record, *(column.to_pylist() for column in batch.columns))
        index += 1


def merge(paths: Iterable[str]) -> Iterator[Record]:
    """All records of all runs in the order of (key, source)."""
    return heapq.merge(*map(read_run, paths), key=order)

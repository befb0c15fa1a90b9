"""Reads what an offline W&B run left on disk.

A `.wandb` file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB with records of CRC (4 bytes),
length (2), type (1: whole, 2: first, 3: middle, 4: last) and data, each whole one a protobuf message.
"""

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7


def finished_records(file: Path, seconds: float = 60) -> list[Record]:
    """All records of a run that was finished. Its service writes the last of them a moment after `finish` returned."""
    ends = time.monotonic() + seconds
    while not (found := records(file)) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < ends, f"{file} has no end"
        time.sleep(0.1)
    return found


def records(file: Path) -> list[Record]:
    """All whole records so far."""
    data, place, found, parts = file.read_bytes(), HEADER, [], b""
    assert data[:4] in (b"", b":W&B"), data[:8]
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        if kind == 0 or place + HEADER + length > len(data):
            break
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):
            found.append(Record.FromString(parts))
            parts = b""
    return found


def nested(items: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Media are logged a field at a time, under keys of two parts."""
    found: dict[str, Any] = {}
    for (first, *rest), value in items.items():
        if rest:
            found.setdefault(first, {})[".".join(rest)] = value
        else:
            found[first] = value
    return found


def read_run(folder: Path) -> dict[str, Any]:
    """History rows, config, tables (by key) and types of artifacts of the one offline run below `folder`."""
    [file] = folder.rglob("run-*.wandb")
    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    artifacts = []
    for record in finished_records(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append(
                nested({tuple(item.nested_key) or (item.key,): json.loads(item.value_json) for item in items})
            )
        if record.WhichOneof("record_type") == "artifact":
            artifacts.append(record.artifact.type)
        if record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.WhichOneof("record_type") == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
    tables = {
        key: json.loads((file.parent / "files" / value["path"]).read_text())
        for row in history
        for key, value in row.items()
        if isinstance(value, dict) and value.get("_type") == "table-file"
    }
    return {
        "history": history,
        "config": config,
        "tables": tables,
        "artifacts": artifacts,
        "files": file.parent / "files",
    }

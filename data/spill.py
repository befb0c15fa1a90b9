"""Reading: every part's texts that may be taken, spilled to disk as runs sorted by hash.

A corpus that is read whole (local files) may be far larger than the budget: only the lowest ranks are kept,
about as many characters as are needed. What one part keeps is a safe limit for the whole corpus, since other
parts can only lower it; below the lowest of all limits nothing is missing, whatever order parts came in.

A corpus that cannot be read whole (hub, environment) is read part by part in its fixed order until there is
enough, a limited stretch of each part; nothing of what was read is left out.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conf.progress import Progress
from conf.stage import digest, write_json
from data.documents import SIDES, Split, pieces
from data.runs import Record, RunWriter
from data.skipped import Skipped
from data.sources import Part, read_texts
from data.workers import Workers

BINS = 1024  # resolution of a limit
SPREAD = 8  # a corpus that is not read whole gives its text from so many parts at least, if it has them


@dataclass(frozen=True)
class Task:
    """One part to read. `quota`: characters a side after which it need give no more."""

    part: Part
    source: int
    split: Split
    whole: bool
    quota: dict[str, float]
    limit: dict[str, float]  # ranks from here on are known not to be needed
    folder: str


@dataclass
class Found:
    """What a part gave. Below `limit` (rank by side) nothing of it is missing; `complete`: nothing at all is."""

    runs: dict[str, list[str]]
    characters: dict[str, list[int]]  # by side, in bins of rank
    limit: dict[str, float]
    complete: bool
    skipped: dict[str, Any] = field(default_factory=dict)  # as of Skipped


def spill_part(task: Task, on_text: Callable[[], None] = lambda: None) -> Found:
    """Read one part; a part that an interrupted run has read is not read again. `on_text` is called after each text."""
    name = f"{task.source:03d}-{digest([asdict(task.part), asdict(task.split), task.whole, task.quota])}"
    prefix, record = Path(task.folder) / name, Path(task.folder) / f"{name}.json"
    if record.exists():
        return Found(**json.loads(record.read_text()))
    writers = {side: RunWriter(prefix.with_name(f"{name}-{side}")) for side in SIDES}
    characters = {side: np.zeros(BINS, dtype=np.int64) for side in SIDES}
    limit, stopped = dict(task.limit), False
    skipped = Skipped()
    for number, text in enumerate(read_texts(task.part, skipped), 1):
        key = task.split.key(text)
        side, rank = task.split.place(key)
        if rank < limit[side]:
            characters[side][int(rank * BINS)] += len(text)
            for piece_key, piece in pieces(key, text):
                writers[side].add(Record(piece_key, task.source, piece.encode("utf-8", "replace")))
        on_text()
        if number % 32 == 0:
            if task.whole:
                limit = {side: min(limit[side], enough_below(characters[side], task.quota[side])) for side in SIDES}
            elif all(characters[side].sum() >= task.quota[side] for side in SIDES):
                stopped = True
                break
    found = Found(
        runs={side: writers[side].close() for side in SIDES},
        characters={side: characters[side].tolist() for side in SIDES},
        limit=limit,
        complete=not stopped and all(value == 1 for value in limit.values()),
        skipped=asdict(skipped),
    )
    Path(task.folder).mkdir(parents=True, exist_ok=True)
    write_json(record, asdict(found))
    return found


def enough_below(characters: np.ndarray, quota: float) -> float:
    """The rank below which there are `quota` characters; 1 if there are not."""
    index = int(np.searchsorted(np.cumsum(characters), quota))
    return 1.0 if index >= BINS else (index + 1) / BINS


@dataclass
class Reading:
    """The state of reading one source, with what its parts gave so far."""

    parts: list[Part]
    whole: bool
    split: Split
    quota: dict[str, float]
    runs: dict[str, list[str]] = field(default_factory=lambda: {side: [] for side in SIDES})
    characters: dict[str, np.ndarray] = field(
        default_factory=lambda: {side: np.zeros(BINS, dtype=np.int64) for side in SIDES}
    )
    limit: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SIDES, 1.0))
    complete: bool = True
    skipped: Skipped = field(default_factory=Skipped)

    def total(self, side: str) -> int:
        return int(self.characters[side].sum())

    @property
    def enough(self) -> bool:
        return not self.whole and all(self.total(side) >= self.quota[side] for side in SIDES)

    def part_quota(self) -> dict[str, float]:
        spread = 1 if self.whole else min(SPREAD, len(self.parts))
        return {side: quota / spread for side, quota in self.quota.items()}

    def part_limit(self) -> dict[str, float]:
        if not self.whole:
            return dict.fromkeys(SIDES, 1.0)
        return {side: enough_below(self.characters[side], self.quota[side]) for side in SIDES}

    def add(self, found: Found) -> None:
        for side in SIDES:
            self.runs[side] += found.runs[side]
            self.characters[side] += np.asarray(found.characters[side])
            self.limit[side] = min(self.limit[side], found.limit[side])
        self.complete &= found.complete
        self.skipped.add(Skipped(**found.skipped))


def spill(workers: Workers, readings: list[Reading], folder: Path) -> None:
    """Read all sources side by side, filling `readings`."""
    progress = Progress("sample: read", None, "characters")

    def tasks() -> Iterator[Task]:
        for number in range(max(len(reading.parts) for reading in readings)):
            for source, reading in enumerate(readings):
                if number < len(reading.parts):
                    if reading.enough:
                        reading.complete = False
                        continue
                    flying.append(reading)
                    yield Task(
                        reading.parts[number],
                        source,
                        reading.split,
                        reading.whole,
                        reading.part_quota(),
                        reading.part_limit(),
                        str(folder),
                    )

    flying: deque[Reading] = deque()
    for found in workers.map(spill_part, tasks(), lambda: progress.advance(0, "still reading")):
        reading = flying.popleft()
        if reading.enough:  # read ahead by another process: with one process it would not have been read
            reading.complete = False
            continue
        reading.add(found)
        progress.advance(sum(sum(found.characters[side]) for side in SIDES))
    progress.close()


def certain(records: Iterable[Record], readings: list[Reading]) -> Iterator[Record]:
    """Records in the order of rank up to where a source's parts may have left something out."""
    for record in records:
        reading = readings[record.source]
        side, rank = reading.split.place(record.key)
        if rank < reading.limit[side]:
            yield record

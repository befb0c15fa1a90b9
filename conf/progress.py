"""How far long work is: a bar on a terminal; elsewhere a line when it begins and one after ten seconds of silence.

Lines come with progress and not from a clock of their own: where a single step takes longer, it speaks after it.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SILENCE = 10.0  # seconds


class Pace:
    """Whether it is time for another word. `clock`: seconds since any moment."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.spoke = clock()

    def due(self) -> bool:
        """True, and counted as said, if nothing was for SILENCE seconds."""
        now = self.clock()
        if now - self.spoke < SILENCE:
            return False
        self.spoke = now
        return True


class Progress:
    """Counts towards `total` of `unit` (tokens, layers), never past it; None where the end is not known."""

    def __init__(self, name: str, total: int | None, unit: str, clock: Callable[[], float] = time.monotonic):
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self.pace, self.clock, self.started = Pace(clock), clock, clock()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=name, unit=unit, unit_scale=True, dynamic_ncols=True) if terminal else None
        self._say()

    def advance(self, amount: int, note: str = "") -> None:
        """So much more is done; `note` says where it is within what is not counted yet."""
        if self.total is not None:
            amount = min(amount, self.total - self.done)
        self.done += amount
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=self.pace.due())
            self.bar.update(amount)
        elif self.pace.due():
            self._say(note)

    def passed(self, item: Item, amount: int) -> Item:
        """The item itself, counted as so much."""
        self.advance(amount)
        return item

    def line(self, text: str) -> None:
        """One line that stays, with the seconds since the start and, at the pace so far, until the end."""
        text = f"{self.name}: {text} [{self.clock() - self.started:.0f} s, {self.left:.0f} s left]"
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
            return
        self.pace.spoke = self.clock()
        print(text, flush=True)

    @property
    def left(self) -> float:
        """Seconds until the end, at the pace so far."""
        return (self.clock() - self.started) * ((self.total or self.done) - self.done) / max(self.done, 1)

    def _say(self, note: str = "") -> None:
        if self.bar is not None:
            return
        end = "" if self.total is None else f" of {self.total:,}"
        left = f"{tqdm.format_interval(self.left)} left" if self.done and self.total else ""
        print(", ".join(filter(None, [f"{self.name}: {self.done:,}{end} {self.unit}", note, left])), flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def counted(items: Sequence[Item], name: str, unit: str) -> Iterator[Item]:
    """The items, one after another, with progress over them."""
    with Progress(name, len(items), unit) as progress:
        for item in items:
            yield item
            progress.advance(1)

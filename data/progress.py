"""A bar on a terminal; elsewhere a line for every tenth of the way (every minute where the end is not known)."""

import sys
import time

from tqdm import tqdm

FEW_SECONDS, MINUTE = 2, 60  # no more lines than this, however fast it goes


class Progress:
    """Counts towards `total` of `unit` (tokens, characters), never past it."""

    def __init__(self, name: str, total: int | None, unit: str):
        self.name, self.total, self.unit = name, total, unit
        self.done, self.tenths, self.spoke = 0, 0, time.monotonic()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=name, unit=unit, unit_scale=True, dynamic_ncols=True) if terminal else None

    def advance(self, amount: int) -> None:
        if self.total is not None:
            amount = min(amount, self.total - self.done)
        self.done += amount
        if self.bar is not None:
            self.bar.update(amount)
        elif self.total:
            tenths = self.done * 10 // self.total
            if tenths > self.tenths and (self._silent_for(FEW_SECONDS) or self.done == self.total):
                self.tenths = tenths
                self._say(f"{self.done:,} of {self.total:,}")
        elif self._silent_for(MINUTE):
            self._say(f"{self.done:,}")

    def _silent_for(self, seconds: float) -> bool:
        return time.monotonic() - self.spoke > seconds

    def _say(self, count: str) -> None:
        self.spoke = time.monotonic()
        print(f"{self.name}: {count} {self.unit}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

"""Progress of one model's evaluation: a bar with the time left on a terminal, a line per task elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts tokens of prompts and windows: the only unit that all parts of an evaluation share."""

    def __init__(self, label: str, tokens: int):
        self.label, self.total, self.done, self.started = label, tokens, 0, time.time()
        self.bar = tqdm(
            total=tokens, desc=label, unit="tok", unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def advance(self, tokens: int) -> None:
        self.done += tokens
        self.bar.update(tokens)

    def line(self, text: str) -> None:
        """One line that stays, with the time since the start and, at the pace so far, until the end."""
        seconds = time.time() - self.started
        left = seconds * (self.total - self.done) / max(self.done, 1)
        self.bar.write(f"{self.label}: {text} [{seconds:.0f} s, {left:.0f} s left]", file=sys.stdout)
        sys.stdout.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

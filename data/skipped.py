"""What reading leaves out: rows without text, files without a row, and a few bad rows, all counted.

A bad row among many good ones is skipped and counted. More of them mean that the file is not what it is taken for
and are an error. The rule looks at one file alone, from its start, so that neither the number of workers nor
a restart can change what is skipped.
"""

from dataclasses import dataclass

FEW, SHARE = 3, 0.01  # bad rows that a file may have: so many, or this share of its rows, but never most of them
EARLY = 100  # bad rows from which on the rule holds for the rows so far, not only at the end


@dataclass
class Skipped:
    """Counts of one source. `first_bad`: file, row and what is wrong with it."""

    bad_rows: int = 0
    empty_rows: int = 0
    empty_files: int = 0
    first_bad: str = ""

    def add(self, other: "Skipped") -> None:
        self.bad_rows += other.bad_rows
        self.empty_rows += other.empty_rows
        self.empty_files += other.empty_files
        self.first_bad = self.first_bad or other.first_bad

    @classmethod
    def sum(cls, *parts: "Skipped") -> "Skipped":
        total = cls()
        for part in parts:
            total.add(part)
        return total

    def __str__(self) -> str:
        counts = (
            (self.bad_rows, "bad row", f" (the first: {self.first_bad})"),
            (self.empty_rows, "row", " without text"),
            (self.empty_files, "file", " without a row"),
        )
        return ", ".join(f"{count:,} {what}{'s' * (count != 1)}{more}" for count, what, more in counts if count)


class FileRows:
    """Rows of one file, counted as they are read; what is left out is counted in `skipped` too.

    Also conversations as they become tokens, which a chat template may refuse; they are of no `file` any more.
    """

    def __init__(self, file: str, skipped: Skipped):
        self.file, self.skipped = file, skipped
        self.good, self.empty, self.bad, self.first = 0, 0, 0, ""

    def leave_empty(self) -> None:
        self.empty += 1
        self.skipped.empty_rows += 1

    def leave_bad(self, reason: str) -> None:
        """ValueError from the EARLY-th on where they are too many. `reason` says which row it is."""
        self.bad += 1
        self.skipped.bad_rows += 1
        self.first = self.first or reason
        place = f"{self.file}, " if self.file else ""
        self.skipped.first_bad = self.skipped.first_bad or f"{place}{self.first}"
        if self.bad >= EARLY:
            self.check()

    def close(self) -> None:
        """At the end of the file; ValueError where too many of its rows were bad."""
        self.skipped.empty_files += not (self.good or self.empty or self.bad)
        self.check()

    def check(self) -> None:
        rows = self.good + self.bad
        if self.bad > min(rows // 2, max(FEW, SHARE * rows)):
            raise ValueError(
                f"{self.first} ({self.bad:,} of {rows:,} rows are bad; up to {FEW}, or {SHARE:.0%}, would be skipped)"
            )


def tell(what: str, skipped: dict[str, Skipped]) -> None:
    """Print what was skipped of sources that had bad rows."""
    for name, found in skipped.items():
        if found.bad_rows:
            print(f"{what}: {name}: skipped {found}", flush=True)

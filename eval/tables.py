"""Tables as plain text for a terminal and as markdown, from the same rows; a missing value is a dash."""

import math
from typing import Any

MISSING = "–"
Rows = list[list[str]]


def number(value: float | None, digits: int = 1) -> str:
    """`1,234.5`; large values without decimals, missing ones as a dash."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "inf" if value > 0 else "nan"
    shown = f"{value:,.{digits if abs(value) < 1000 else 0}f}"
    return shown.lstrip("-") if not shown.strip("-0.") else shown  # no "-0.0"


def percent(value: float | None, digits: int = 2) -> str:
    """A share as percent: 0.6875 → `68.75 %`."""
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def whole(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def text_table(header: list[str], rows: Rows, width: int = 80) -> str:
    """Columns two spaces apart, the first to the left and cut in its middle until a line fits, the others right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    widths[0] = max(min(widths[0], width - sum(2 + each for each in widths[1:])), 8)

    def line(cells: list[str]) -> str:
        first, tail = cells[0], widths[0] * 2 // 3
        if len(first) > widths[0]:
            first = first[: widths[0] - tail - 1] + "…" + first[-tail:]
        others = (cell.rjust(size) for cell, size in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([first.ljust(widths[0]), *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * size for size in widths), *map(line, rows)])


def markdown_table(header: list[str], rows: Rows) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([line(header), rule, *map(line, rows)])


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as `a.b: value`; lists and long texts are left out."""
    if not isinstance(value, dict):
        return {} if isinstance(value, list) or len(str(value)) > 80 else {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found

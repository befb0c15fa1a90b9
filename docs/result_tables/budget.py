"""The table of ranks and bits against the quantised original."""

from typing import Any

from result_tables.common import load, number, table, where

COLUMNS = ("kivi", "transform", "converted-untrained", "converted")


def budget() -> str:
    """Change of perplexity and KL to the original at every cut in bytes: quantised, converted, healed."""
    found = load("budget")
    cuts = sorted({row["reduction"] for row in found["rows"]})
    rows = []
    for cut in cuts:
        own = [row for row in found["rows"] if row["reduction"] == cut]
        rows.append([f"-{100 * cut:.2f} %", *(cell([row for row in own if column(row) == name]) for name in COLUMNS)])
    text, healed = found["text"], found["healing"]
    note = (
        f"{found['model']}, {text['windows']} windows of {text['sequence_length']} tokens of WikiText-2's test text, "
        f"original {number(found['original_perplexity'])}: change of perplexity, and KL to the original in nats; one "
        f"forward a window, {text['dtype']}; cut of a cache of {text['cached_tokens']:,} tokens that `generate` "
        f"filled, everything counted; healed on {healed['tokens']:,} tokens of prose at a rate of 5e-5 to 3e-4 in "
        f"{healed['minutes']} minutes; {where(found['provenance'])}. `docs/results/budget.json`"
    )
    head = ["cut in bytes", "original, KIVI", "original, transform coding", "converted, untrained", "converted, healed"]
    return table(head, rows) + "\n\n" + note


def column(row: dict[str, Any]) -> str:
    """Whose a row is: kivi-4 and kivi-2 share a column."""
    name: str = row["name"]
    return name if name.startswith("converted") else name.partition("-")[0]


def cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    change = rows[0]["perplexity"] / rows[0]["original_perplexity"] - 1
    return f"{100 * change:+.1f} %, {rows[0]['kl_divergence']:.3f}"

"""The table of ranks and bits against the quantised original."""

from result_tables.common import load, number, table, where


def budget() -> str:
    """Perplexity and KL at a cut in bytes, of the original with a quantised cache and converted."""
    found = load("budget")
    rows = []
    for row in found["rows"]:
        change = row["perplexity"] / row["original_perplexity"] - 1
        cells = [row["name"], f"{-100 * row['reduction']:.1f} %", number(row["perplexity"]), f"{100 * change:+.1f} %"]
        rows.append([*cells, f"{row['kl_divergence']:.3f}"])
    note = (
        f"{found['model']}, {found['text']['windows']} windows of {found['text']['sequence_length']} tokens of "
        f"WikiText-2's test text, one forward a window, {found['text']['dtype']}, original "
        f"{number(found['original_perplexity'])}; cut of a cache of 4,096 tokens, scales and first tokens counted; "
        f"{where(found['provenance'])}. `docs/results/budget.json`"
    )
    return table(["", "cache", "perplexity", "change", "KL"], rows) + "\n\n" + note

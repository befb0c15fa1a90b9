"""The table of ranks and bits against the quantised original."""

from result_tables.common import load, number, table, where


def budget() -> str:
    """Perplexity and KL at a cut in bytes, of the original with a quantised cache and converted."""
    found = load("budget")
    rows = []
    for row in found["rows"]:
        change = row["perplexity"] / row["original_perplexity"] - 1
        cells = [row["label"], f"{-100 * row['reduction']:.1f} %", number(row["perplexity"]), f"{100 * change:+.1f} %"]
        rows.append([*cells, "" if row["kl_divergence"] is None else f"{row['kl_divergence']:.3f}"])
    text, whole = found["text"], number(found["original_perplexity"])
    note = (
        f"{found['model']}, {text['windows']} windows of {text['sequence_length']} tokens of WikiText-2's test text, "
        f"one forward a window, {text['dtype']}, original {whole} (kivi: the first 8 windows alone, whose original has "
        "30.15); cut of a cache of 4,096 tokens, scales and first tokens counted; "
        f"{where(found['provenance'])}. `docs/results/budget.json`"
    )
    return table(["", "cache", "perplexity", "change", "KL"], rows) + "\n\n" + note

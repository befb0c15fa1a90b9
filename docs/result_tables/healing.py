"""Tables of healing runs: perplexity by tokens, losses, positions."""

from eval.healing import times_fewer
from result_tables.common import load, number, table, where


def healing(name: str = "healing") -> str:
    """Perplexity of one text before and after healing."""
    found = load(name)
    rows = [
        [
            row["name"],
            f"{-100 * row['reduction']:.2f} %",
            row["loss"],
            row["trainable"],
            f"{row['learning_rate']:g}",
            f"{row['global_batch_size']} x {row['sequence_length']:,}",
            f"{row['tokens']:,}",
            number(row["curve"][0][1]),
            number(row["curve"][-1][1]),
            times_fewer(row["saved"]) if row["saved"] else "",
        ]
        for row in found["runs"]
    ]
    head = ["", "cache", "loss", "trained", "rate", "tokens a step", "tokens", "converted", "healed", "fewer tokens"]
    note = (
        "SmolLM2-135M-Instruct, WikiText-2 as above. Fewer tokens: how many times as many the published "
        "method took to the same perplexity, where that saves most, calibration text counted on both sides (>=: it "
        f"never came so far); {where(found['provenance'])}. `docs/results/{name}.json`"
    )
    return table(head, rows) + "\n\n" + note


def healing_long() -> str:
    return healing("healing_long")


def healing_losses() -> str:
    """What is trained, by what loss."""
    found = load("healing_losses")
    rows = [
        [
            row["loss"],
            row["trainable"],
            f"{row['learning_rate']:g}",
            *(number(text) for _, text, _ in row["curve"]),
        ]
        for row in found["runs"]
    ]
    first = found["runs"][0]
    head = ["loss", "trained", "rate", *(f"{tokens:,}" for tokens, _, _ in first["curve"])]
    note = (
        f"Perplexity of WikiText-2 by training tokens at {-100 * first['reduction']:.2f} %, "
        f"{first['global_batch_size']} x {first['sequence_length']} tokens a step; "
        f"{where(found['provenance'])}. `docs/results/healing_losses.json`"
    )
    return table(head, rows) + "\n\n" + note


def positions() -> str:
    """Perplexity by position in long documents, as ratios to the original."""
    found = load("positions")
    names = list(found["perplexity"])
    base = found["perplexity"][names[0]]
    rows = [[names[0], *map(number, base)]]
    for name in names[1:]:
        ratios = [value / other for value, other in zip(found["perplexity"][name], base, strict=True)]
        rows.append([name, *(f"{ratio:.2f}x" for ratio in ratios)])
    head = ["tokens", *(f"{first:,}-{last:,}" for first, last in found["positions"])]
    note = (
        f"{found['documents']} documents of {found['length']:,} tokens; {where(found['provenance'])}. "
        "`docs/results/positions.json`"
    )
    return table(head, rows) + "\n\n" + note

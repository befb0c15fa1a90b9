"""Tables of docs/families.md and docs/scaling.md."""

from result_tables.common import load, table, where


def families() -> str:
    """What works for which family: yes where every test of it passed."""
    found = load("families")
    rows, columns = [], ["exact at full budget", "absorbed decode", "generate", "checkpoint", "quantised cache"]
    columns += ["healing", "layer by layer", "native export", "vLLM form"]
    for name, shown in sorted(found["families"].items()):
        cells = []
        for column in columns:
            counts = shown.get(column, {})
            cells.append("fails" if counts.get("failed") else next(iter(counts), ""))
        rows.append([name, *cells])
    note = f"From the outcomes of the tests that show it; {where(found['provenance'])}. `docs/results/families.json`"
    return table(["", *columns], rows) + "\n\n" + note


def span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def scaling() -> str:
    found, rows = load("scaling"), []
    for row in found["rows"]:
        whole, need = row["conversion"], row["healing"]
        rows.append(
            [
                row["model"],
                str(row["gpus"]),
                f"{whole['whole_gib']:,.1f} GiB",
                f"{whole['streamed_gib']:,.1f} GiB",
                span(whole["seconds"]),
                f"{row['tokens'] / 1e9:g} B",
                f"{need['gib']:,.1f} GiB",
                span(need["seconds"]),
            ]
        )
    head = ["", "GPUs", "convert, whole", "layer by layer", "time", "healing tokens", "a GPU holds", "time"]
    return table(head, rows) + f"\n\n{found['machine']}, {found['provenance']['commit']}. `docs/results/scaling.json`"


def scaling_measured() -> str:
    """What was measured beside what the formula says of it."""
    rows = [
        [row["what"], row["measured"], row["formula"], f"{row['ratio']:.2f}"]
        for row in load("scaling_measured")["rows"]
    ]
    return table(["", "measured", "formula", "formula / measured"], rows) + "\n\n`docs/results/scaling_measured.json`"

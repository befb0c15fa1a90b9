"""The picture of a bench: decoded tokens a second and cache, by context and batch."""

from pathlib import Path
from typing import Any

from eval.picture import quiet_pyplot, save

COLOURS = ("#444444", "#c44e52", "#2a6fbb", "#8172b3", "#937860", "#55a868", "#da8bc3", "#ccb974", "#8c8c8c", "#64b5cd")
LINES = ("-", "--", ":", "-.")


def draw_bench(result: dict[str, Any], file: Path) -> None:
    """One line a variant and batch over the contexts, or bars where there is one context only."""
    pyplot = quiet_pyplot()
    names = list(dict.fromkeys(name for place in result["grid"] for name in place["variants"]))
    contexts = sorted({place["context"] for place in result["grid"]})
    batches = sorted({place["batch"] for place in result["grid"]})
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4), dpi=130, layout="constrained")
    bench = result["bench"]
    title = f"{result['model']}, {bench['dtype']} on {bench.get('chip') or bench['device']}"
    title += f", {bench['threads']} threads" if "threads" in bench else ""
    figure.suptitle(title, fontsize=12)
    for panel, key, label, unit in (
        (axes[0], "tokens_per_second", "decoded tokens/s", 1),
        (axes[1], "cache_bytes", "cache (MiB, measured)", 2**20),
    ):
        for name, colour in zip(names, COLOURS * 2, strict=False):
            for batch, line in zip(batches, LINES * 4, strict=False):
                found = {
                    place["context"]: place["variants"][name][key] / unit
                    for place in result["grid"]
                    if place["batch"] == batch and key in place["variants"].get(name, {})
                }
                if len(contexts) == 1:
                    if found:
                        where = names.index(name) + 0.8 * (batches.index(batch) + 0.5) / len(batches) - 0.4
                        panel.bar(where, next(iter(found.values())), 0.8 / len(batches), color=colour)
                else:
                    shown = f"{name}, batch {batch}" if len(batches) > 1 else name
                    panel.plot(list(found), list(found.values()), line, marker="o", color=colour, label=shown)
        if len(contexts) == 1:
            panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
            panel.set_title(f"{contexts[0]:,} cached tokens, batch {', '.join(map(str, batches))}", fontsize=10)
        else:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
            panel.set_xlabel("cached tokens a sequence")
        panel.set_ylabel(label)
        panel.grid(alpha=0.25, linewidth=0.6)
    if len(contexts) > 1:
        axes[0].legend(frameon=False, fontsize=7)
    save(figure, file)

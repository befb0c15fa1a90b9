"""Healing curves of several fine-tunings: perplexity of one text against training tokens.

    python -m eval.healing outputs/MODEL/RUN... --output docs/results/healing

Every run was fine-tuned with `eval.perplexity_text=FILE`, which the trainer then measures whenever it validates. Writes
OUTPUT.json (a curve a run, what it was trained with, how many times the tokens the slowest run needs to come as far)
and OUTPUT.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from conf.stage import provenance, write_json

SETTINGS = ("loss", "trainable", "learning_rate", "global_batch_size")


def healing_curve(folder: Path) -> dict[str, Any]:
    """One run's row; ValueError where a run is unfinished or has measured no text."""
    stage = folder / "finetune" / "stage.json"
    if not stage.exists():
        raise ValueError(f"{folder} holds no finished fine-tuning ({stage} is missing)")
    metrics = json.loads(stage.read_text())["metrics"]
    settings = yaml.safe_load((folder / "finetune" / "config.yaml").read_text())["finetune"]
    conversion = json.loads((folder / "convert" / "conversion.json").read_text())
    history = json.loads((folder / "finetune" / "history.json").read_text())["validation"]
    if not all("text_perplexity" in row for row in history):
        raise ValueError(f"{folder} measured no text while it trained; fine-tune with eval.perplexity_text=FILE")
    return {
        "name": folder.name,
        "reduction": conversion["reduction"],
        "reconstructed": bool(conversion.get("reconstruction")),
        **{name: settings[name] for name in SETTINGS},
        "tokens": metrics["tokens"],
        "tokens_per_second": metrics["tokens_per_second"],
        "mixed_precision": metrics["mixed_precision"],
        "curve": [[row["tokens"], row["text_perplexity"], row["perplexity"]] for row in history],
    }


def tokens_to_reach(curve: list[list[float]], perplexity: float) -> float | None:
    """Training tokens after which the text's perplexity is at most this, at a measured point; None if never."""
    return next((tokens for tokens, text, _ in curve if text <= perplexity), None)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """One line a run, colours by loss, dashes by what was trained; both axes linear in tokens, log in perplexity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    cuts = sorted({row["reduction"] for row in rows})
    figure, panels = pyplot.subplots(
        1, len(cuts), figsize=(1.5 + 4.6 * len(cuts), 4.6), dpi=130, layout="constrained", squeeze=False, sharey=True
    )
    for axes, cut in zip(panels[0], cuts, strict=True):
        for row in rows:
            if row["reduction"] == cut:
                points = [(tokens / 1000, text) for tokens, text, _ in row["curve"]]
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.4, label=row["name"])
                axes.annotate(
                    f"{points[-1][1]:,.1f}",
                    points[-1],
                    xytext=(4, 0),
                    textcoords="offset points",
                    fontsize=8,
                    va="center",
                )
        axes.set_title(f"KV cache -{100 * cut:.2f} %", fontsize=10)
        axes.set_xlabel("training tokens (thousands)")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.margins(x=0.12)
        axes.legend(frameon=False, fontsize=8)
    panels[0][0].set_ylabel("perplexity (log scale, lower is better)")
    figure.savefig(file, format="png")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders: outputs/MODEL/RUN")
    parser.add_argument("--output", type=Path, required=True, help="path of the JSON and the picture, without suffix")
    options = parser.parse_args()
    try:
        rows = [healing_curve(run) for run in options.runs]
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads((options.runs[0] / "finetune" / "stage.json").read_text())["provenance"]
    write_json(options.output.with_suffix(".json"), {"runs": rows, "provenance": record or provenance()})
    draw(rows, options.output.with_suffix(".png"))
    for row in rows:
        print(
            f"{row['name']:<28} {row['curve'][0][1]:>12,.1f} -> {row['curve'][-1][1]:>9,.2f}  {row['tokens']:,} tokens"
        )


if __name__ == "__main__":
    main()

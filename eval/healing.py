"""Healing curves of several fine-tunings: perplexity of one text against training tokens.

    python -m eval.healing outputs/MODEL/RUN... --reference mha2mla --output docs/results/healing

Every run was fine-tuned with `eval.perplexity_text=FILE`, which the trainer then measures whenever it validates. Writes
OUTPUT.json (a curve a run, what it was trained with, and how many times fewer tokens it needed than the run of the same
cache size and precision whose name begins like the reference) and OUTPUT.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from conf.errors import ends_in_one_line
from conf.stage import read_record, write_json
from eval.picture import log_perplexity, quiet_pyplot, save

SETTINGS = ("loss", "trainable", "learning_rate", "global_batch_size")


def healing_curve(folder: Path) -> dict[str, Any]:
    """One run's row; ValueError where a run is unfinished or has measured no text."""
    finetuned, converted = read_record(folder / "finetune"), read_record(folder / "convert")
    if finetuned is None or converted is None:
        raise ValueError(f"{folder} holds no finished fine-tuning (stage.json of convert or finetune is missing)")
    metrics = finetuned["metrics"]
    settings = yaml.safe_load((folder / "finetune" / "config.yaml").read_text())["finetune"]
    conversion = json.loads((folder / "convert" / "conversion.json").read_text())
    history = json.loads((folder / "finetune" / "history.json").read_text())["validation"]
    if not all("text_perplexity" in row for row in history):
        raise ValueError(f"{folder} measured no text while it trained; fine-tune with eval.perplexity_text=FILE")
    return {
        "name": folder.name,
        "reduction": conversion["reduction"],
        "calibration_tokens": converted["metrics"]["calibration_tokens"],
        **{name: settings[name] for name in SETTINGS},
        "sequence_length": metrics["tokens"] // metrics["steps"] // settings["global_batch_size"],
        "tokens": metrics["tokens"],
        "tokens_per_second": metrics["tokens_per_second"],
        "mixed_precision": metrics["mixed_precision"],
        "curve": [[row["tokens"], row["text_perplexity"], row["perplexity"]] for row in history],
        "provenance": finetuned["provenance"],
    }


def tokens_to_reach(curve: list[list[float]], perplexity: float) -> float | None:
    """Training tokens after which the text's perplexity is at most this, at a measured point; None if never."""
    return next((tokens for tokens, text, _ in curve if text <= perplexity), None)


def saved_tokens(row: dict[str, Any], rows: list[dict[str, Any]], reference: str) -> dict[str, Any] | None:
    """How many times more tokens the reference took to a perplexity that `row` has too, calibration text included.

    Of the measured points the one that saves most; `at_least` where the reference never came to it, and its whole
    training counts. None where no other run of the same cache size and precision is called so, or where `row` never
    comes as far.
    """
    same = ("reduction", "mixed_precision")
    others = [other for other in rows if other["name"].startswith(reference)]
    others = [other for other in others if all(other[name] == row[name] for name in same)]
    if not others or row in others:
        return None
    points = []
    for other in others:
        for perplexity in [other["curve"][-1][1], *(point[1] for point in row["curve"])]:
            ours, theirs = tokens_to_reach(row["curve"], perplexity), tokens_to_reach(other["curve"], perplexity)
            if ours is None:
                continue
            tokens = ours + row["calibration_tokens"]
            trained = other["tokens"] if theirs is None else theirs
            times = (trained + other["calibration_tokens"]) / tokens
            points.append((times, theirs is None, tokens, perplexity, other["name"]))
    if not points:
        return None
    times, unreached, tokens, perplexity, name = max(points)
    return {
        "reference": name,
        "perplexity": perplexity,
        "tokens": tokens,
        "times_fewer": times,
        "at_least": unreached,
    }


def times_fewer(saved: dict[str, Any]) -> str:
    return f"{'>= ' if saved['at_least'] else ''}{saved['times_fewer']:.1f}x"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """One panel a cache size, one line a run."""
    pyplot = quiet_pyplot()
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
        log_perplexity(axes)
        axes.label_outer()  # the axis of perplexity is shared
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.margins(x=0.12)
        axes.legend(frameon=False, fontsize=8)
    save(figure, file)


@ends_in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders: outputs/MODEL/RUN")
    parser.add_argument("--output", type=Path, required=True, help="path of the JSON and the picture, without suffix")
    parser.add_argument("--reference", default="mha2mla", help="how the names of runs to compare with begin")
    options = parser.parse_args()
    try:
        rows = [healing_curve(run) for run in options.runs]
        for row in rows:
            row["saved"] = saved_tokens(row, rows, options.reference)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    records = [row.pop("provenance") for row in rows]
    write_json(options.output.with_suffix(".json"), {"runs": rows, "provenance": records[0]})
    draw(rows, options.output.with_suffix(".png"))
    for row in rows:
        saved = f"  {times_fewer(row['saved'])} fewer" if row["saved"] else ""
        start, end = row["curve"][0][1], row["curve"][-1][1]
        print(f"{row['name']:<24}{start:>12,.1f} -> {end:>9,.2f}{row['tokens']:>12,} tokens{saved}")
    print("precision: " + ", ".join(f"{row['name']} {row['mixed_precision']}" for row in rows))


if __name__ == "__main__":
    main()

"""The picture of a report or a sweep: KV-cache reduction against what it costs, converted and healed."""

from pathlib import Path
from typing import Any

COLOURS = {"original": "#444444", "converted": "#c44e52", "healed": "#2a6fbb"}
MARKS = {"original": "s", "converted": "o", "healed": "D"}


def draw(points: list[dict[str, Any]], file: Path, title: str) -> None:
    """Draw `points` (results of reports) into `file`: score drop on the left, perplexity on the right.

    A point that lacks a value is not drawn; nothing is drawn as zero.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=12)
    text = next(iter(points[0]["perplexity"]), "")

    drops = {"original": [(0.0, 0.0)]} | {
        model: curve(points, model, lambda point, model: point["score_drop"][model]["points"])
        for model in ("converted", "healed")
    }
    original = points[0]["perplexity"].get(text, {}).get("original")
    perplexities = {"original": [] if original is None else [(0.0, original)]} | {
        model: curve(points, model, lambda point, model: point["perplexity"].get(text, {}).get(model))
        for model in ("converted", "healed")
    }
    for axes, curves, unit in ((left, drops, "{:+.1f}"), (right, perplexities, "{:,.4g}")):
        for model, places in curves.items():
            draw_curve(axes, places, model, unit, label_all=len(points) <= 6)
        axes.set_xlim(-6, 106)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("KV-cache reduction (%, measured bytes)")
        axes.grid(alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    left.axhline(0, color=COLOURS["original"], linewidth=0.8, linestyle=":")
    left.set_ylabel("score drop (points, lower is better)")
    score = points[0]["score"]["original"]
    scored = "none was run" if score is None else f"mean of {len(points[0]['tasks'])}, original {score:.1f}"
    left.set_title(f"generation tasks ({scored})", fontsize=10)
    left.margins(y=0.18)
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e6 else f"{value:.0e}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylabel("perplexity (log scale, lower is better)")
    right.set_title(f"text: {text}", fontsize=10)
    right.margins(y=0.18)
    left.legend(frameon=False, loc="best")
    temporary = file.with_name(file.name + ".tmp")
    figure.savefig(temporary, format="png")
    pyplot.close(figure)
    temporary.replace(file)


def curve(points: list[dict[str, Any]], model: str, value: Any) -> list[tuple[float, float]]:
    """(reduction in percent, value) of one model over all points that have both, by reduction."""
    found = [(point["kv_cache_reduction"].get(model), value(point, model)) for point in points]
    return sorted((100 * x, y) for x, y in found if x is not None and y is not None)


def draw_curve(axes: Any, places: list[tuple[float, float]], model: str, unit: str, label_all: bool) -> None:
    if not places:
        return
    xs, ys = zip(*places, strict=True)
    axes.plot(
        xs, ys, marker=MARKS[model], markersize=7, color=COLOURS[model], linewidth=1.4, alpha=0.9, label=model, zorder=3
    )
    for x, y in places if label_all else []:
        axes.annotate(
            unit.format(y),
            (x, y),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=COLOURS[model],
        )

"""The picture that a sweep ends in: what every way to a smaller cache loses, against the bytes that it saves."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.frontier import METRICS, method
from eval.picture import Result, quiet_pyplot, save

FRONTIER = "frontier.png"
BASELINES = {"kivi": "original, quantised (kivi)", "transform": "original, transform coding"}
POINTS = {"converted": "converted, no training", "healed": "converted and healed"}
LOOKS = {  # colour, mark and line of each kind
    POINTS["healed"]: ("#2a6fbb", "D", "-"),
    POINTS["converted"]: ("#c44e52", "o", "--"),
    BASELINES["kivi"]: ("#55a868", "P", "-"),
    BASELINES["transform"]: ("#8172b3", "X", "-"),
}
OTHERS = ("#937860", "v", ":")  # of healed models with their caches in a few bits more
LINEAR = 5  # percent of change of perplexity up to which its axis is linear
CUTS = (0.0, 0.5, 0.75, 0.875, 0.9375, 0.96875, 0.984375)  # at which the axis has its marks

Places = list[tuple[float, float, str]]  # reduction, loss, label


def lines(points: list[Result], loss: Callable[[Result, str], float | None]) -> dict[str, Places]:
    """Places of every kind over all points, by reduction; what is missing or saves no bytes is left out."""
    found: dict[str, dict[tuple[float, float], str]] = {}
    several = len({point["model"] for point in points}) > 1
    for point in points:
        baselines = point.get("baselines", ())
        for model, cut in point["kv_cache_reduction"].items():
            value = loss(point, model)
            if cut is None or value is None or not math.isfinite(value) or cut >= 1:
                continue
            kind = BASELINES[method(model)] if model in baselines else POINTS.get(model, model)
            kind = f"{point['model']}: {kind}" if several else kind
            label = f"{model.partition('-')[2]} bit" if model in baselines else ""
            found.setdefault(kind, {})[cut, value] = label  # points share their baselines
    return {
        kind: [(cut, value, label) for (cut, value), label in sorted(places.items())] for kind, places in found.items()
    }


def distance(point: Result, text: str, model: str) -> float | None:
    """KL to the original; not drawn where it is 0, of which there is no logarithm."""
    return point.get("kl_divergence", {}).get(text, {}).get(model) or None


def change(point: Result, text: str, model: str) -> float | None:
    """Perplexity against the original's, in percent more."""
    values = point["perplexity"].get(text, {})
    own, original = values.get(model), values.get("original")
    return 100 * (own / original - 1) if own and original else None


def draw_frontier(points: list[Result], file: Path, title: str) -> bool:
    """KL to the original on the left, change of perplexity on the right; False, and no file, where there are no bytes.

    The axis is logarithmic in the bytes that are left: every halving is as wide.
    """
    text = next(iter(points[0]["perplexity"]))
    panels = {
        "kl_divergence": lines(points, lambda point, model: distance(point, text, model)),
        "perplexity": lines(points, lambda point, model: change(point, text, model)),
    }
    panels = {metric: found for metric, found in panels.items() if found}
    if not panels:
        return False
    pyplot = quiet_pyplot()
    size = (5.6 * len(panels), 4.8)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, dpi=130, layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=12)
    for each, (metric, found) in zip(axes[0], panels.items(), strict=True):
        draw_lines(each, found)
        bytes_axis(each)
        each.set_title(f"{METRICS[metric]}, text: {text}", fontsize=10)
        (divergence_axis if metric == "kl_divergence" else change_axis)(each)
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, file)
    return True


def draw_lines(axes: Any, found: dict[str, Places]) -> None:
    for kind in sorted(found, key=lambda kind: [*LOOKS, look_of(kind)].index(look_of(kind))):
        colour, mark, style = LOOKS.get(look_of(kind), OTHERS)
        xs, ys = [saved(cut) for cut, _, _ in found[kind]], [value for _, value, _ in found[kind]]
        axes.plot(xs, ys, style, marker=mark, color=colour, label=kind, markersize=6, linewidth=1.4, alpha=0.9)
        for x, (_, y, label) in zip(xs, found[kind], strict=True):
            place = {"xytext": (-6, 3), "textcoords": "offset points", "ha": "right"}
            axes.annotate(label, (x, y), fontsize=7, color=colour, **place)
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def look_of(kind: str) -> str:
    """The kind without its model's name."""
    return kind.rpartition(": ")[2]


def saved(cut: float) -> float:
    """How often the bytes were halved."""
    return -math.log2(1 - cut)


def bytes_axis(axes: Any) -> None:
    low, high = axes.get_xlim()
    low, high = low - 0.2, high + 0.2
    kept = [cut for cut in CUTS if low <= saved(cut) <= high]
    axes.set_xticks([saved(cut) for cut in kept], [f"{100 * cut:.5g}" for cut in kept])
    axes.set_xlim(low, high)
    axes.set_xlabel("reduction of the cache in bytes (%, measured, of the original's 16 bits)")


def divergence_axis(axes: Any) -> None:
    """A logarithmic axis of KL with readable numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("KL to the original (nats a token, log scale)")


def change_axis(axes: Any) -> None:
    """Percent of change, logarithmic beyond a few: it may be negative."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.5)
    axes.autoscale(axis="y")
    low, high = axes.get_ylim()
    marks = [sign * mark * 10**power for sign in (-1, 1) for power in range(6) for mark in (1, 2, 5)]
    kept = [mark for mark in sorted({0, *marks}) if low <= mark <= high and (not mark or abs(mark) >= LINEAR / 2)]
    axes.yaxis.set_major_locator(FixedLocator(kept))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+,.0f} %" if value else "0 %")
    axes.axhline(0, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_ylabel(f"change of perplexity (log scale beyond {LINEAR} %)")

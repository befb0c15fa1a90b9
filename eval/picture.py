"""The picture of a report or a sweep: KV-cache reduction against what it costs, converted, healed and quantised."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

COLOURS = {"original": "#444444", "converted": "#c44e52", "healed": "#2a6fbb"}
MARKS = {"original": "s", "converted": "o", "healed": "D"}
CODED = (("#8172b3", "^"), ("#937860", "v"), ("#da8bc3", "<"), ("#8c8c8c", ">"))  # of caches in few bits, in turn
QUANTIZED = ("original, quantised", "#55a868", "P")  # the line of all baselines
LABELLED = 6  # points; more would cover each other

Result = dict[str, Any]  # a report's results.json
Curve = list[tuple[float, float]]  # (reduction in percent, value)


def draw(points: list[Result], file: Path, title: str) -> None:
    """Draw the results of one or more runs into `file`: score drop on the left, perplexity on the right.

    A value that is missing is not drawn; nothing is drawn as zero. A grey line joins a point's two models.
    """
    pyplot = quiet_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=12)
    for axes in (left, right):
        axes.set_xlim(-6, 106)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("KV-cache reduction (%, measured, of the original's 16 bits)")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.margins(y=0.18)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)

    score = points[0]["score"]["original"]
    draw_curves(left, points, lambda point, model: point["score_drop"][model]["points"], 0.0, "{:+.0f}", "{:+.1f}")
    left.set_ylabel("score drop (points, lower is better)")
    scored = "none was run" if score is None else f"mean of {len(points[0]['tasks'])}, original {score:.1f}"
    left.set_title(f"generation tasks ({scored})", fontsize=10)
    left.legend(frameon=False, loc="best")

    text = next(iter(points[0]["perplexity"]))
    originals = {point["perplexity"].get(text, {}).get("original") for point in points}
    original = originals.pop() if len(originals) == 1 else None  # points of several models have several
    draw_curves(
        right, points, lambda point, model: point["perplexity"].get(text, {}).get(model), original, "{:,.0f}", "{:.1f}"
    )
    log_perplexity(right)
    right.set_title(f"text: {text}", fontsize=10)

    save(figure, file)


def draw_healing(history: dict[str, Any], original: dict[str, float | None], file: Path) -> bool:
    """Perplexity over training tokens into `file`: the held-out split's, and a text's where it was measured.

    original: the original model's perplexities by text, drawn as dotted lines. False, and no file, without a curve.
    """
    rows = [row for row in history.get("validation", []) if "tokens" in row]
    if len(rows) < 2:
        return False
    pyplot = quiet_pyplot()
    others = [text for text in original if text != "validation"]
    curves = {"validation": "perplexity"} | ({others[0]: "text_perplexity"} if others else {})
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=130, layout="constrained")
    for (text, key), colour in zip(curves.items(), ("#2a6fbb", "#c44e52"), strict=False):
        places = [(row["tokens"], row[key]) for row in rows if row.get(key)]
        if places:
            axes.plot(*zip(*places, strict=True), marker="o", markersize=4, color=colour, label=text)
        base = original.get(text)
        if places and base:
            axes.axhline(base, color=colour, linewidth=0.8, linestyle=":")
    log_perplexity(axes)
    axes.set_xlabel("training tokens (dotted: the original model)")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False)
    save(figure, file)
    return True


def quiet_pyplot() -> Any:
    """pyplot that draws into files, with or without a display; loaded when there is something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, file: Path) -> None:
    """Write and close a figure; the file appears only when it is whole."""
    temporary = file.with_name(file.name + ".tmp")
    for text in figure.findobj(match=lambda artist: hasattr(artist, "set_parse_math")):
        if "$" in text.get_text() and "\\math" not in text.get_text():  # a name is no formula; ticks' numbers are
            text.set_parse_math(False)
    figure.savefig(temporary, format="png")
    quiet_pyplot().close(figure)
    temporary.replace(file)


def log_perplexity(axes: Any) -> None:
    """A logarithmic axis of perplexity with readable numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if 1 <= value < 1e7 else f"{value:g}")
    )
    axes.set_ylabel("perplexity (log scale, lower is better)")


def draw_curves(
    axes: Any,
    points: list[Result],
    value: Callable[[Result, str], float | None],
    original: float | None,
    large: str,
    small: str,
) -> None:
    """The original's mark with a line through it; curves of baselines, of converted and of healed over all points."""
    converted, healed = (curve(points, model, value) for model in ("converted", "healed"))
    for x, y in converted:
        for other_x, other_y in healed:
            if x == other_x:
                axes.plot([x, x], [y, other_y], color="#999999", linewidth=0.8, linestyle="--", zorder=1)
    if original is not None:
        axes.axhline(original, color=COLOURS["original"], linewidth=0.8, linestyle=":", zorder=1)
    curves = {"original": [] if original is None else [(0.0, original)], "converted": converted, "healed": healed}
    baselines = list(dict.fromkeys(name for point in points for name in point.get("baselines", ())))
    coded = [model for model in points[0]["score"] if model not in COLOURS and model not in baselines]
    looks = {model: (COLOURS[model], MARKS[model]) for model in COLOURS} | dict(zip(coded, CODED, strict=False))
    curves |= {model: curve(points, model, value) for model in looks if model in coded}
    draw_baselines(axes, {model: curve(points, model, value) for model in baselines}, len(points) == 1)
    for model, places in curves.items():
        xs, ys = [x for x, _ in places], [y for _, y in places]
        colour, mark = looks[model]
        style = {"marker": mark, "color": colour, "label": model}
        axes.plot(xs, ys, markersize=7, linewidth=1.4, alpha=0.9, zorder=3, **style)
        if len(points) > LABELLED:
            continue
        for x, y in places:
            shown = (large if abs(y) >= 100 or (abs(y) >= 10 and len(points) > 1) else small).format(y) if y else "0"
            # Away from the grey line and from rising curves: healed ones below on the right, the others above.
            place, side = (
                ((0 if x == 0 else -2, 8), "center") if model in ("original", "converted") else ((6, -13), "left")
            )
            axes.annotate(shown, (x, y), xytext=place, textcoords="offset points", ha=side, fontsize=8, color=colour)


def draw_baselines(axes: Any, found: dict[str, Curve], labelled: bool) -> None:
    """Marks of the quantised original, and one line through those that no other beats in bytes and loss together."""
    places = {place: model for model, curve in found.items() for place in curve}  # points of a sweep share them
    if not places:
        return
    name, colour, mark = QUANTIZED
    best = [place for place in sorted(places) if not any(is_better(other, place) for other in places)]
    axes.plot(*zip(*places, strict=True), mark, color=colour, markersize=6, alpha=0.5, zorder=2)
    axes.plot(*zip(*best, strict=True), marker=mark, color=colour, label=name, markersize=7, linewidth=1.4, zorder=2)
    for place in best if labelled else ():
        style = {"ha": "right", "fontsize": 7, "color": colour}
        axes.annotate(places[place], place, xytext=(-6, 3), textcoords="offset points", **style)


def is_better(other: tuple[float, float], place: tuple[float, float]) -> bool:
    """Of two places (reduction, loss): whether the first saves as much and loses no more, and they are not alike."""
    return other != place and other[0] >= place[0] and other[1] <= place[1]


def curve(points: list[Result], model: str, value: Callable[[Result, str], float | None]) -> Curve:
    """One model over all points that have both figures, by reduction."""
    found = [(point["kv_cache_reduction"].get(model), value(point, model)) for point in points]
    return sorted((100 * x, y) for x, y in found if x is not None and y is not None)

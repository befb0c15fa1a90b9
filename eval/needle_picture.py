"""The heat map of pass keys: how often each model finds one, by depth and length of the text around it."""

from pathlib import Path

from eval.builtin import DEPTHS, LENGTHS
from eval.picture import quiet_pyplot, save


def draw_needles(found: dict[str, list[list[float]]], file: Path) -> bool:
    """A map a model into `file`; found: rows of depth, share of the longest prompt and score, by model.

    A cell without a row stays white. False, and no file, where nothing was found.
    """
    if not found:
        return False
    import numpy

    pyplot = quiet_pyplot()
    size = (2.4 * len(found) + 1.4, 2.9)
    figure, panels = pyplot.subplots(1, len(found), figsize=size, dpi=130, layout="constrained", squeeze=False)
    image = None
    for axes, (model, rows) in zip(panels[0], found.items(), strict=True):
        total, count = numpy.zeros((DEPTHS, LENGTHS)), numpy.zeros((DEPTHS, LENGTHS))
        for depth, share, score in rows:
            cell = round(depth * (DEPTHS - 1)), round(share * LENGTHS) - 1
            total[cell] += 100 * score
            count[cell] += 1
        means = numpy.where(count > 0, total / numpy.maximum(count, 1), numpy.nan)
        image = axes.imshow(means, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for (depth, length), value in numpy.ndenumerate(means):
            if value == value:
                axes.text(length, depth, f"{value:.0f}", ha="center", va="center", fontsize=8)
        axes.set_title(model, fontsize=9)
        axes.set_xticks(range(LENGTHS), [f"{100 * (each + 1) // LENGTHS} %" for each in range(LENGTHS)], fontsize=7)
        axes.set_yticks(range(DEPTHS), [f"{100 * each // (DEPTHS - 1)} %" for each in range(DEPTHS)], fontsize=7)
        axes.set_xlabel("length", fontsize=8)
    panels[0][0].set_ylabel("depth of the pass key", fontsize=8)
    figure.colorbar(image, ax=panels[0].tolist(), label="found (%)")
    save(figure, file)
    return True

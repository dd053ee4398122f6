"""Pictures of training and scoring runs as PNG files.

Each is drawn from numbers that are also in the run's JSON files. Blue is the digit and what is right,
orange the sum and what is wrong: they differ with any kind of colour blindness.
"""

import functools
import io
from collections.abc import Callable
from typing import Any, Final, ParamSpec

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mnistsum_ray.model.heads import HEADS

_GREY: Final = "#666666"
_STYLES: Final = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "v"))
"""Colour and marker of each head, of the palette of Okabe and Ito."""

_STYLE: Final[dict[Any, Any]] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
}

_ACROSS: Final = 6
"""Most images beside each other."""

_ERROR_TICKS: Final = (0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
"""Ticks of a logarithmic scale of percent."""

P = ParamSpec("P")


def _png(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """Give a drawing function the common style, and save what it draws as a PNG file."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> bytes:
        file = io.BytesIO()
        # From Matplotlib's own defaults: a user's matplotlibrc may ask for LaTeX, which may be missing.
        with style.context(["default", _STYLE]):
            FigureCanvasAgg(draw(*args, **kwargs)).print_png(file)  # type: ignore[no-untyped-call]
        return file.getvalue()

    return drawn


@_png
def draw_history(history: list[dict[str, Any]], card: dict[str, Any]) -> Figure:
    """Loss and error (100 % less the accuracy) of each head by epoch."""
    figure = Figure(figsize=(9, 4))
    losses, errors = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    steps = [
        (entry["epoch"] - 1 + step / entry["step_losses"][-1][0], loss)
        for entry in history
        for step, loss in entry["step_losses"]
    ]
    losses.plot(*zip(*steps, strict=True), color=_GREY, linewidth=1, label="training")
    for split, line, face in (("validation", ":", "white"), ("test", "-", None)):
        means = [entry[split]["loss"] for entry in history]
        losses.plot(epochs, means, f"D{line}", color="black", markerfacecolor=face, label=split)
        for head, (color, marker) in zip(HEADS, _STYLES, strict=False):
            shares = [entry[split][f"{head.name}_accuracy"] for entry in history]
            label = f"{head.name}, {split}"
            share_wrong = 100 - 100 * np.array(shares)
            errors.plot(epochs, share_wrong, marker + line, color=color, markerfacecolor=face, label=label)
    for head, (color, _) in zip(HEADS, _STYLES, strict=False):
        error = 100 - 100 * card["test"][f"{head.name}_accuracy"]
        errors.plot(card["epoch"], error, "*", markersize=12, color=color, markeredgecolor="black")
    losses.set(title="loss, nats (mean of the heads)", yscale="log")
    errors.set(title="error, % (stars: finished model)")
    errors.set_yscale("symlog", linthresh=0.1)  # a few test rows may have no error at all
    low, high = errors.get_ylim()
    errors.set_yticks(_ERROR_TICKS)
    errors.set_ylim(max(0, low), high)  # all ticks would widen it
    errors.yaxis.set_major_formatter("{x:g}")
    for axes in (losses, errors):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid()
        axes.legend(loc="upper right")
    return figure


@_png
def draw_confusion(confusion: list[list[int]]) -> Figure:
    """Rows by true digit (down) and predicted digit (across); right ones blue, mistakes orange."""
    counts = np.array(confusion)
    right = np.eye(len(counts), dtype=bool)
    # On a logarithmic scale a mistake can be seen beside a thousand right ones. 1 has a colour, too.
    shades = LogNorm(0.3, max(10, counts.max()))(np.maximum(counts, 0.3))
    colors = np.where(right[..., None], colormaps["Blues"](shades), colormaps["Oranges"](shades))
    colors[counts == 0] = 1
    figure = Figure(figsize=(6.5, 6))
    axes = figure.subplots()
    axes.imshow(colors)
    for (true, predicted), count in np.ndenumerate(counts):
        color = "white" if shades[true, predicted] > 0.6 else "black"
        axes.text(predicted, true, f"{count:,}" if count else "", ha="center", va="center", fontsize=9, color=color)
    hits, places = np.diag(counts), range(len(counts))
    axes.set(
        title=f"digits: {hits.sum() / max(1, counts.sum()):.2%} of {counts.sum():,} rows correct",
        xlabel="predicted digit, and precision",
        ylabel="true digit, and recall",
    )
    precision = [_percent(hits[digit], counts[:, digit].sum()) for digit in places]
    recall = [_percent(hits[digit], counts[digit].sum()) for digit in places]
    axes.set_xticks(places, [f"{digit}\n{share}" for digit, share in enumerate(precision)], fontsize=8)
    axes.set_yticks(places, [f"{share}  {digit}" for digit, share in enumerate(recall)], fontsize=8)
    return figure


def _percent(right: int, total: int) -> str:
    return f"{right / total:.1%}" if total else "-"


@_png
def draw_mistakes(mistakes: list[dict[str, Any]], images: npt.NDArray[np.uint8]) -> Figure:
    """Each mistake (of the manifest's error analysis) with its image, uint8[n, 28, 28], and answers."""
    down = max(1, -(-len(mistakes) // _ACROSS))
    figure = Figure(figsize=(9, 0.6 + 2.1 * down))
    figure.suptitle("the most confident mistakes on test images" if mistakes else "no mistakes on test images")
    panels = figure.subplots(down, _ACROSS, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, mistake, image in zip(panels, mistakes, images, strict=False):
        axes.imshow(image, "gray", vmin=0, vmax=255)  # as the data are, light or dark
        axes.set_title("\n".join(_answer_lines(mistake)), fontsize=9)
    return figure


def _answer_lines(answer: dict[str, Any]) -> list[str]:
    """The question; of each head the predicted class, its probability and, if wrong, the true class."""
    lines = [f"image + {answer['number']}"]
    for head in HEADS:
        predicted, true = answer[f"pred_{head.name}"], head.target(answer["digit"], answer["number"])
        wrong = "" if predicted == true else f", not {true}"
        lines.append(f"{head.name} {predicted} ({answer[f'{head.name}_prob']:.0%}){wrong}")
    return lines


@_png
def draw_reliability(heads: dict[str, Any]) -> Figure:
    """Reliability diagram of each head: accuracy and rows by predicted probability, in equal bins.

    `heads` has the `ece` (expected calibration error) of each, and in `reliability` by bin the number
    of `rows`, of `right` ones, and the sum of their `probability`.
    """
    figure = Figure(figsize=(4.5 * len(heads), 5))
    panels = figure.subplots(2, len(heads), sharex="col", squeeze=False, height_ratios=(3, 1))
    for column, ((name, head), (color, marker)) in enumerate(zip(heads.items(), _STYLES, strict=False)):
        above, below = panels[:, column]
        rows, right, probability = (np.array(head["reliability"][key]) for key in ("rows", "right", "probability"))
        used, edges = rows > 0, np.linspace(0, 1, len(rows) + 1)
        above.plot([0, 1], [0, 1], "--", color=_GREY, linewidth=1, label="perfect calibration")
        above.plot(probability[used] / rows[used], right[used] / rows[used], marker, color=color, label="accuracy")
        above.set(title=f"{name}: expected calibration error {head['ece']:.4f}", ylabel="accuracy")
        above.legend(loc="lower right")
        below.bar(edges[:-1], rows, np.diff(edges), align="edge", color=color, edgecolor="white", linewidth=0.5)
        below.set_yscale("symlog", linthresh=1)  # nearly all rows are in the last bin
        below.set(xlabel="predicted probability", ylabel="rows")
        for axes in (above, below):
            axes.grid()
    return figure

"""Pictures of training and scoring runs as PNG files, legible on a slide, on paper and at the width of a README.

Each is drawn from numbers that are also in the run's JSON files. Blue is the digit and what is right, orange the sum and what is
wrong: they differ with any kind of colour blindness, and heads also have markers of their own.
"""

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, Final, ParamSpec

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.reliability import Reliability

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#666666"  # of the palette of Okabe and Ito
_STYLES: Final = ((_BLUE, "o"), (_ORANGE, "s"), ("#009e73", "^"), ("#cc79a7", "v"), ("#e69f00", "P"))
_HEAD_STYLES: Final = [_STYLES[index % len(_STYLES)] for index in range(len(HEADS))]
"""Colour and marker of each head."""

_STYLE: Final[dict[Any, Any]] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.markersize": 5,
    "figure.dpi": 150,
}

_MAX_DIFFERENCE: Final = 1.0
"""End of the colour scale of `draw_sums`, in points of accuracy: the same for all runs, so that they can be compared."""

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
        with rc_context(_STYLE):
            FigureCanvasAgg(draw(*args, **kwargs)).print_png(file)  # type: ignore[no-untyped-call]  # `savefig` draws it twice
        return file.getvalue()

    return drawn


@_png
def draw_history(history: list[dict[str, Any]], card: dict[str, Any]) -> Figure:
    """Loss and error (100 % less the accuracy) of each head by epoch, on scales where small numbers can be told apart.

    The errors of the finished model, `card`, are marked.
    """
    lines = -(-3 * len(HEADS) // 2)  # of the legend of the errors, in two columns
    figure, (losses, errors) = _panels(3.3 + 0.2 * lines, 2, bottom=0.45 + 0.2 * lines)
    epochs = [entry["epoch"] for entry in history]
    steps = [
        (entry["epoch"] - 1 + step / entry["step_losses"][-1][0], loss)
        for entry in history
        for step, loss in entry["step_losses"]
    ]
    losses.plot(*zip(*steps, strict=True), color=_GREY, linewidth=1, alpha=0.7, label="training")
    shown: list[float] = []
    for split, line, face in (("validation", "--", {"markerfacecolor": "white"}), ("test", "-", {})):
        values = [entry[split]["loss"] for entry in history]
        losses.plot(epochs, values, f"D{line}", color="black", label=split, **face)
        for head, (color, marker) in zip(HEADS, _HEAD_STYLES, strict=True):
            values = [100 - 100 * entry[split][f"{head.name}_accuracy"] for entry in history]
            errors.plot(epochs, values, marker + line, color=color, label=f"{head.name}, {split}", **face)
            shown += values
    for index, (head, (color, _)) in enumerate(zip(HEADS, _HEAD_STYLES, strict=True)):
        shown.append(100 - 100 * card["test"][f"{head.name}_accuracy"])
        label = f"{head.name}, test, finished model"
        size = max(15 - 6 * index, 6)  # stars of one error are all seen
        errors.plot(
            card["epoch"], shown[-1], "*", markersize=size, color=color, markeredgecolor="black", markeredgewidth=0.6, label=label
        )
    losses.set(title="loss, nats (mean of the heads)", xlim=(0, epochs[-1] * 1.05), yscale="log")
    errors.set(title="error, %", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    errors.set_yscale("symlog", linthresh=0.1)  # a few test rows may have no error at all
    errors.set_yticks(_ERROR_TICKS)
    errors.set_yticks([], minor=True)
    low = max(tick for tick in _ERROR_TICKS if tick <= min(shown))
    errors.set_ylim(low, min((tick for tick in _ERROR_TICKS if tick > max(shown)), default=100))
    losses.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    for axes in (losses, errors):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid()
        # Below the axes, where no curve is.
        columns = 3 if axes is losses else 2
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.17), ncols=columns, borderaxespad=0, columnspacing=1)
    return figure


@_png
def draw_confusion(confusion: list[list[int]], rows: str = "test images") -> Figure:
    """Confusion matrix of the digits: `rows` by true digit (down) and predicted digit; right ones blue, mistakes orange."""
    counts = np.array(confusion)
    right = np.eye(len(counts), dtype=bool)
    # On a logarithmic scale a mistake can be seen beside a thousand right ones. It begins below 1, which then has a colour.
    norm = LogNorm(0.3, max(10, counts.max()))
    shades = norm(np.maximum(counts, 0.3))
    colors = np.where(right[..., None], colormaps["Blues"](shades), colormaps["Oranges"](shades))
    colors[counts == 0] = 1
    texts = [[f"{count:,}" if count else "" for count in row] for row in counts]
    correct = np.trace(counts) / max(1, counts.sum())
    title = f"digits: {correct:.2%} of {counts.sum():,} {rows} correct\n\n"
    figure = _heat_map(
        colors, texts, shades > 0.6, title, "predicted digit", "recall, %", _percent(np.diag(counts), counts.sum(1))
    )
    (axes,) = figure.axes
    for place, label in enumerate(_percent(np.diag(counts), counts.sum(0))):
        axes.text(place, -0.65, label, ha="center", va="bottom", fontsize=9, color=_GREY)
    axes.text((len(counts) - 1) / 2, -0.98, "precision, %", ha="center", va="bottom", color=_GREY)
    return figure


@_png
def draw_sums(sums_right: list[list[int]], confusion: list[list[int]]) -> Figure:
    """Wrong sums by true digit (down) and number (across); the colour compares with the wrong digits, in points of accuracy.

    A sum can be as right as its digit: orange is what the sum head adds to the mistakes. `sums_right` are test images with a
    correct sum, by digit and number; `confusion` is the matrix of the digits.
    """
    rows = np.sum(confusion, 1)
    wrong_digits = rows - np.diag(confusion)
    wrong_sums = rows[:, None] - np.array(sums_right)
    difference = 100 * (wrong_digits[:, None] - wrong_sums) / np.maximum(rows, 1)[:, None]
    shades = 0.5 + difference.clip(-_MAX_DIFFERENCE, _MAX_DIFFERENCE) / _MAX_DIFFERENCE / 2
    texts = [[f"{count:,}" for count in row] if images else [""] * NUMBERS for row, images in zip(wrong_sums, rows, strict=True)]
    # From brown orange over white to violet, which any kind of colour blindness can tell apart.
    pairs = NUMBERS * rows.sum()
    found = "cells: wrong sums. Orange: more than wrong digits, violet: fewer\n"
    found += f"(darkest: by {_MAX_DIFFERENCE:g}% of the digit's images)"
    title = f"sums: {np.sum(sums_right) / max(1, pairs):.2%} of {pairs:,} test pairs correct\n{found}"
    beside = [f"{count:,}" for count in wrong_digits]
    return _heat_map(colormaps["PuOr"](shades), texts, abs(shades - 0.5) > 0.35, title, "number", "wrong digits", beside)


@_png
def draw_mistakes(mistakes: list[dict[str, Any]], images: npt.NDArray[np.uint8]) -> Figure:
    """Each mistake (entries of the manifest's error analysis) with its image, uint8[n, 28, 28], prediction and true answer."""
    title = "the most confident mistakes on test images" if mistakes else "no mistakes on test images"
    down = -(-len(mistakes) // _ACROSS)
    across = -(-len(mistakes) // max(1, down))  # as many in each line, but for the last one
    cell_width, cell_height = 1.5, 1.31 + 0.18 * (1 + len(HEADS))  # inches; a line for the question, and one for each answer
    width, height = max(4.2, across * cell_width), down * cell_height + 0.45
    figure = Figure(figsize=(width, height))
    # One pair of axes in inches, from the upper left corner: a pair for each image takes several times as long.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.text(width / 2, 0.08, title, ha="center", va="top", fontsize=12)
    for place, (mistake, image) in enumerate(zip(mistakes, images, strict=True)):
        x = width / 2 + (place % across - (across - 1) / 2) * cell_width
        y = 0.45 + place // across * cell_height
        # As the data are, light or dark.
        axes.imshow(image, "gray", vmin=0, vmax=255, extent=(x - 0.55, x + 0.55, y + 1.1, y), interpolation="nearest")
        for line, (text, color) in enumerate(_answer_lines(mistake)):
            axes.text(x, y + 1.15 + 0.18 * line, text, ha="center", va="top", color=color, fontsize=9)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def _answer_lines(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """The question, and of each head the predicted class, its probability and, if that is wrong, the true class."""
    lines = [(f"image + {answer['number']}", "black")]
    for head in HEADS:
        predicted, true = answer[f"pred_{head.name}"], head.target(answer["digit"], answer["number"])
        probability = answer[f"{head.name}_prob"]
        text = f"{head.name} {predicted} ({'>99%' if probability > 0.99 else f'{probability:.0%}'})"
        wrong = f"{text}, not {true}" if head.classes > 2 else text  # of two classes the other one is true
        lines.append((text, _BLUE) if predicted == true else (wrong, _ORANGE))
    return lines


@_png
def draw_reliability(heads: dict[str, Reliability]) -> Figure:
    """Reliability diagram of each head: accuracy by predicted probability, in the bins of `Reliability`, and rows by bin."""
    figure, panels = _panels(4.8, len(heads), left=0.9, down=(3, 1))
    for (name, head), axes, below, (color, marker) in zip(heads.items(), *panels, _HEAD_STYLES, strict=False):
        rows, right = np.array(head.rows), np.array(head.right)
        used, edges = rows > 0, np.linspace(0, 1, len(rows) + 1)
        _draw_histogram(below, rows, color, "predicted probability", rows.max())
        rows, right, probability = rows[used], right[used], np.array(head.probability)[used] / rows[used]
        start = edges[:-1][used].min(initial=1 - edges[1])
        axes.plot([start, 1], [start, 1], "--", color=_GREY, linewidth=1, label="perfect calibration")
        axes.plot(probability, right / rows, marker, color=color, label="accuracy")
        ece = head.ece
        axes.set_title(f"{name}" if ece is None else f"{name}: expected calibration error {ece:.4f}")
        axes.set_xlim(start - 0.02 * (1 - start), 1 + 0.02 * (1 - start))
        axes.legend(loc="lower right")
        axes.grid()
    figure.text(0.1 / figure.get_figwidth(), 0.64, "accuracy", rotation=90, va="center")
    figure.text(0.1 / figure.get_figwidth(), 0.21, "rows", rotation=90, va="center")
    return figure


@_png
def draw_probabilities(histograms: dict[str, list[int]]) -> Figure:
    """Histogram of a scoring run's predicted probabilities, by column: rows in bins of equal width over 0..1."""
    figure, panels = _panels(3.4, len(histograms), left=0.9)
    highest = max(max(counts) for counts in histograms.values())
    for axes, (column, counts), (color, _) in zip(panels, histograms.items(), _HEAD_STYLES, strict=False):
        _draw_histogram(axes, counts, color, column, highest)
        last_bin = counts[-1] / max(1, sum(counts))
        axes.set_title(f"{column.removesuffix('_prob')}: {last_bin:.2%} of {sum(counts):,} rows above {1 - 1 / len(counts):.2f}")
        axes.set_xlim(0, 1)
    figure.text(0.1 / figure.get_figwidth(), 0.5, "rows", rotation=90, va="center")
    return figure


def _draw_histogram(axes: Axes, rows: npt.ArrayLike, color: str, label: str, highest: int) -> None:
    """Draw rows by probability, in bins of equal width over 0..1; `highest` is the most rows of a bin of this scale."""
    edges = np.linspace(0, 1, np.size(rows) + 1)
    axes.bar(edges[:-1], rows, np.diff(edges), align="edge", color=color, edgecolor="white", linewidth=0.5)
    axes.set_yscale("symlog", linthresh=1)  # nearly all rows are in the last bin; the others are the interesting ones
    axes.set(xlabel=label, ylim=(0, max(10, 2 * highest)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y")


def _percent(right: npt.NDArray[Any], totals: npt.NDArray[Any]) -> list[str]:
    return [f"{100 * hits / total:.1f}" if total else "-" for hits, total in zip(right, totals, strict=True)]


def _panels(height: float, across: int, left: float = 0.6, bottom: float = 0.55, down: Sequence[int] = ()) -> tuple[Figure, Any]:
    """A figure of this height in inches, and its axes: [across], or [down, across] with these ratios of their heights.

    The margins in inches are fixed: to compute them takes as long as to draw.
    """
    width = 4.5 * across
    figure = Figure(figsize=(width, height))
    places = {"left": left / width, "right": 1 - 0.15 / width, "bottom": bottom / height, "top": 1 - 0.35 / height}
    places |= {"wspace": 0.22, "hspace": 0.06 if down else 0}
    axes = figure.subplots(len(down) or 1, across, sharex="col", squeeze=False, height_ratios=down or None, gridspec_kw=places)
    return figure, axes if down else axes[0]


def _heat_map(
    colors: npt.NDArray[Any],
    texts: list[list[str]],
    dark: npt.NDArray[np.bool_],
    title: str,
    across: str,
    name: str,
    beside: list[str],
) -> Figure:
    """Cells by true digit (down), of colours RGBA[n, m, 4], and their texts, which are white where the colour is dark.

    `beside`: a label at the right of each line of cells, of which `name` is the title.
    """
    lines, columns = dark.shape
    side, left, right, below, head = 0.48, 0.65, 0.75, 0.6, 0.95  # inches; `side` is that of a cell
    width, height = left + side * columns + right, below + side * lines + head
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, below / height, side * columns / width, side * lines / height))
    edges = (np.arange(size + 1) - 0.5 for size in (columns, lines))
    axes.pcolormesh(*edges, colors, edgecolors="#dddddd", linewidth=0.5)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set(xticks=range(columns), yticks=range(lines), xlabel=across, ylabel="true digit")
    axes.set_title(title)
    axes.tick_params(length=0)
    for (y, x), white in np.ndenumerate(dark):
        axes.text(x, y, texts[y][x], ha="center", va="center", fontsize=9, color="white" if white else "black")
    for place, label in enumerate(beside):
        axes.text(columns - 0.4, place, label, va="center", fontsize=9, color=_GREY)
    axes.text(columns + 0.45, (lines - 1) / 2, name, va="center", rotation=90, color=_GREY)
    return figure

"""Pictures of training and scoring runs as PNG bytes, legible at the width of a README.

Each is drawn from numbers that are also in the run's JSON files.
"""

import io
import textwrap
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.metrics import Reliability

_MAX_DIFFERENCE: Final = 1.0
"""End of the colour scale of `draw_sums`, in points of accuracy: the same for all runs, so that they can be compared."""

_REASONS_DRAWN: Final = 12
_REASON_WIDTH: Final = 60


def draw_history(history: list[dict[str, Any]], card: dict[str, Any]) -> bytes:
    """Loss and error (100 % less the accuracy) of each head by epoch, on scales where small numbers can be told apart.

    Args:
        history: lines of history.jsonl.
        card: contents of model.json; its own errors are marked.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    losses.plot(epochs, [entry["train_loss"] for entry in history], "o-", markersize=4, color="tab:gray", label="training")
    for split, style in (("test", "o-"), ("validation", "o--")):
        losses.plot(epochs, [entry[split]["loss"] for entry in history], style, markersize=4, color="tab:blue", label=split)
        for head, color in zip(HEADS, TABLEAU_COLORS, strict=False):
            shares = [100 - 100 * entry[split][f"{head.name}_accuracy"] for entry in history]
            errors.plot(epochs, shares, style, markersize=4, color=color, label=f"{head.name}, {split}")
    for head, color in zip(HEADS, TABLEAU_COLORS, strict=False):
        error = 100 - 100 * card["test"][f"{head.name}_accuracy"]
        errors.plot(card["epoch"], error, "*", markersize=11, color=color, markeredgecolor="black")
    losses.set(title="loss (mean of all heads, nats)", xlabel="epoch", yscale="log")
    errors.set(title="error, % (stars: the model)", xlabel="epoch")
    errors.set_yscale("symlog", linthresh=0.1, subs=(2, 5))  # a few test rows may have no error at all
    errors.yaxis.set_major_formatter("{x:g}")
    errors.yaxis.set_minor_formatter("{x:g}")
    for axes in (losses, errors):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def draw_confusion(confusion: list[list[int]]) -> bytes:
    """Confusion matrix of the digits: true digit down, predicted digit across; the colour shows mistakes only.

    Beside a digit stands the share of its images that are predicted right, below one the share of its predictions that are right.
    """
    counts = np.array(confusion)
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    mistakes = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    texts = [[f"{count:,}" if count else "" for count in row] for row in counts]
    _grid(axes, mistakes, texts, "Reds", (0, max(1, mistakes.max())))
    correct = np.trace(counts) / max(1, counts.sum())
    axes.set(title=f"digits: {correct:.2%} of {counts.sum():,} test images correct")
    axes.set(xlabel="predicted digit, and precision in %", ylabel="true digit, and recall in %")
    digits = range(len(counts))
    axes.set_yticks(digits, _rates(np.diag(counts), counts.sum(1), "  "), fontsize=8)
    axes.set_xticks(digits, _rates(np.diag(counts), counts.sum(0), "\n"), fontsize=8)
    return _png(figure)


def draw_sums(sums_right: list[list[int]], confusion: list[list[int]]) -> bytes:
    """Sum accuracy by true digit (down) and number (across), as difference from the accuracy of the digit, in points.

    A sum can be as right as its digit: a negative difference is what the sum head adds to the mistakes.

    Args:
        sums_right: test images with a correct sum, by digit and number.
        confusion: confusion matrix of the digits, for the number of images of each digit.
    """
    rows = np.array(confusion).sum(1, keepdims=True)
    right = np.diag(np.array(confusion))[:, None]
    difference = 100 * (np.array(sums_right) - right) / np.maximum(rows, 1)
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.subplots()
    texts = [
        [f"{value:+.1f}" if round(value, 1) else "0" for value in line] if images else [""] * len(line)
        for line, images in zip(difference, rows[:, 0], strict=True)
    ]
    # Purple and orange can be told apart with any kind of colour blindness.
    _grid(axes, difference, texts, "PuOr", (-_MAX_DIFFERENCE, _MAX_DIFFERENCE))
    pairs = NUMBERS * rows.sum()
    correct = np.sum(sums_right) / max(1, pairs)
    axes.set(title=f"sums: {correct:.2%} of {pairs:,} test pairs correct\ncells: points above or below the digit's accuracy")
    axes.set_yticks(range(len(rows)), _rates(right[:, 0], rows[:, 0], "  "), fontsize=8)
    axes.set(xlabel="number", ylabel="true digit, and its accuracy in %")
    return _png(figure)


def draw_mistakes(mistakes: list[dict[str, Any]], images: npt.NDArray[np.uint8]) -> bytes:
    """Each mistake with its image, its prediction and the true answer.

    Args:
        mistakes: entries of the error analysis in manifest.json, most confident first.
        images: their images, uint8[n, 28, 28].
    """
    columns = 6
    lines = max(1, -(-len(mistakes) // columns))
    height = 2.25 * lines + 0.4
    figure = Figure(figsize=(1.75 * columns, height))
    figure.suptitle("the most confident mistakes on test images" if mistakes else "no mistakes on test images")
    # In inches: 0.85 above for the titles, and 0.6 between the lines. A layout that is computed takes half a second.
    places = {"left": 0.01, "right": 0.99, "bottom": 0.1 / height, "top": 1 - 0.85 / height, "wspace": 0.1, "hspace": 0.38}
    grid = figure.subplots(lines, columns, squeeze=False, gridspec_kw=places).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, mistake, image in zip(grid, mistakes, images, strict=False):
        digit, number = mistake["digit"], mistake["number"]
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        # One below the other, so that the prediction can be compared with the true answer.
        axes.set_title(
            f"image + {number}\n"
            f"model: {mistake['pred_digit']} ({mistake['digit_prob']:.0%}), "
            f"sum {mistake['pred_sum']} ({mistake['sum_prob']:.0%})\n"
            f"true: {digit}, sum {digit + number}",
            fontsize=7,
        )
    return _png(figure)


def draw_reliability(heads: dict[str, Reliability]) -> bytes:
    """Reliability diagram of each head: accuracy by predicted probability, in the bins of `Reliability`."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    for axes, (name, head) in zip(figure.subplots(1, len(heads)), heads.items(), strict=True):
        rows, right = np.array(head.rows), np.array(head.right)
        used = rows > 0
        rows, accuracy, probability = rows[used], right[used] / rows[used], np.array(head.probability)[used] / rows[used]
        axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1, label="perfect calibration")
        # Error bars: one standard error of the accuracy, with Wilson's estimate, which is not 0 for bins of accuracy 0 or 1.
        estimate = (right[used] + 0.5) / (rows + 1)
        error = np.sqrt(estimate * (1 - estimate) / rows)
        axes.errorbar(probability, accuracy, error, fmt="o", markersize=4, capsize=2, label="predictions")
        for x, y, count in zip(probability, accuracy, rows, strict=True):
            axes.annotate(f"{count:,}", (x, y), xytext=(-3, 5), textcoords="offset points", fontsize=7, ha="right")
        ece = head.metrics()["ece"]
        calibration = "" if ece is None else f", expected calibration error {ece:.4f}"
        axes.set(title=f"{name}{calibration}", xlabel="predicted probability", ylabel="accuracy")
        axes.set(xlim=(-0.02, 1.04), ylim=(-0.05, 1.09))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", fontsize=8)
    return _png(figure)


def draw_probabilities(histograms: dict[str, list[int]]) -> bytes:
    """Histogram of a scoring run's predicted probabilities, by column: rows in bins of equal width over 0..1."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (column, counts) in zip(figure.subplots(1, len(histograms), sharey=True), histograms.items(), strict=True):
        width = 1 / len(counts)
        edges = np.arange(len(counts)) * width
        axes.bar(edges, counts, width=width, align="edge", edgecolor="white", linewidth=0.5)
        last_bin = counts[-1] / max(1, sum(counts))
        axes.set(title=f"{column.removesuffix('_prob')}: {last_bin:.2%} of {sum(counts):,} rows above {1 - width:.2f}")
        axes.set(xlabel=column, xlim=(0, 1))
        axes.set_yscale("symlog", linthresh=1)  # nearly all rows are in the last bin; the others are the interesting ones
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("rows")
    return _png(figure)


def draw_rejects(reasons: dict[str, int]) -> bytes:
    """Rejected rows by reason, the most frequent first."""
    shown = dict(list(reasons.items())[:_REASONS_DRAWN])
    if len(reasons) > len(shown):
        shown["other reasons"] = shown.get("other reasons", 0) + sum(list(reasons.values())[_REASONS_DRAWN:])
    labels = [textwrap.fill(reason, _REASON_WIDTH) for reason in shown]
    figure = Figure(figsize=(9, 0.9 + 0.45 * len(shown)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(shown)), list(shown.values()), color="tab:red")
    axes.bar_label(bars, labels=[f"{count:,}" for count in shown.values()], padding=3)
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title=f"{sum(shown.values()):,} rejected rows by reason", xlabel="rows")
    return _png(figure)


def _rates(right: npt.NDArray[Any], totals: npt.NDArray[Any], separator: str) -> list[str]:
    """Label of each digit: itself, and the share of its rows that are right, in percent."""
    shares = [f"{100 * hits / total:.1f}" if total else "-" for hits, total in zip(right, totals, strict=True)]
    return [f"{digit}{separator}{share}" for digit, share in enumerate(shares)]


def _grid(axes: Axes, values: npt.NDArray[Any], texts: list[list[str]], colormap: str, limits: tuple[float, float]) -> None:
    axes.imshow(values, cmap=colormap, vmin=limits[0], vmax=limits[1], alpha=0.75)
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    for (down, across), _ in np.ndenumerate(values):
        axes.text(across, down, texts[down][across], ha="center", va="center", fontsize=8)


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()

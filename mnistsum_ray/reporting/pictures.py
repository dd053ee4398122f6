"""The pictures of a run, each drawn from numbers that lie beside it: PNG, legible at the width of a README. No torch, no Ray."""

import io
import textwrap
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnistsum_ray.model.calibration import Reliability

_REASONS_DRAWN: Final = 12
_REASON_WIDTH: Final = 60


def draw_history(history: list[dict[str, Any]]) -> bytes:
    """Loss and both accuracies by epoch, of the lines of history.jsonl: what the original ends with."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    losses.plot(epochs, [entry["train_loss"] for entry in history], "o-", markersize=4, label="train")
    losses.plot(epochs, [entry["test"]["loss"] for entry in history], "o-", markersize=4, label="test")
    losses.set(title="loss (mean of both heads, nats)", xlabel="epoch", yscale="log")
    for name, label in (("digit_accuracy", "digit"), ("sum_accuracy", "sum")):
        accuracies.plot(epochs, [100 * entry["test"][name] for entry in history], "o-", markersize=4, label=label)
    accuracies.set(title="test accuracy, % (sum: all ten numbers)", xlabel="epoch")
    later = [100 * entry["test"][name] for entry in history[1:] for name in ("digit_accuracy", "sum_accuracy")]
    if later:  # the first epoch is so far below that the others would be one line; it comes in from under the edge
        margin = max(0.1, 0.1 * (max(later) - min(later)))
        accuracies.set_ylim(min(later) - margin, max(later) + margin)
    for axes in (losses, accuracies):
        axes.legend()
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def draw_confusion(confusion: list[list[int]]) -> bytes:
    """Rows by true digit (down) and predicted digit (across), of `Examination.confusion`; the shade tells mistakes only."""
    counts = np.array(confusion)
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    mistakes = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    _grid(
        axes, mistakes, [[f"{count:,}" if count else "" for count in row] for row in counts], "Reds", (0, max(1, mistakes.max()))
    )
    right = np.trace(counts) / max(1, counts.sum())
    axes.set(title=f"digits: {right:.2%} of {counts.sum():,} test images right", xlabel="predicted digit", ylabel="true digit")
    return _png(figure)


def draw_sums(sums_right: list[list[int]], confusion: list[list[int]]) -> bytes:
    """Sum accuracy in % by true digit (down) and number (across), of an `Examination`."""
    rows = np.array(confusion).sum(1, keepdims=True)
    accuracy = 100 * np.array(sums_right) / np.maximum(rows, 1)
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.subplots()
    texts = [[f"{value:.1f}" if some else "" for value in line] for line, some in zip(accuracy, rows[:, 0], strict=True)]
    low = float(accuracy[rows[:, 0] > 0].min(initial=100))
    _grid(axes, accuracy, texts, "RdYlGn", (min(low, 99.0), 100.0))
    share = np.sum(sums_right) / max(1, 10 * rows.sum())
    axes.set(title=f"sums: {share:.2%} of {10 * rows.sum():,} test pairs right, %", xlabel="number", ylabel="true digit")
    return _png(figure)


def draw_mistakes(mistakes: list[dict[str, Any]], images: npt.NDArray[np.uint8]) -> bytes:
    """Mistakes as in `Examination.as_json` and their images uint8[n, 28, 28]: what was asked, answered and true."""
    columns = 6
    lines = max(1, -(-len(mistakes) // columns))
    figure = Figure(figsize=(1.75 * columns, 2.25 * lines + 0.4), layout="constrained")
    figure.suptitle("the most confident mistakes on test images" if mistakes else "no mistakes on test images")
    for place, axes in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
        axes.axis("off")
        if place >= len(mistakes):
            continue
        one, image = mistakes[place], images[place]
        digit, number = one["digit"], one["number"]
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        # Beneath each other, so that a wrong answer stands right above the true one.
        axes.set_title(
            f"asked: image + {number}\n"
            f"said {one['pred_digit']} ({one['digit_prob']:.0%}), sum {one['pred_sum']} ({one['sum_prob']:.0%})\n"
            f"true {digit}, sum {digit + number}",
            fontsize=7.5,
        )
    return _png(figure)


def draw_reliability(heads: dict[str, Reliability]) -> bytes:
    """Reliability diagram: share of right answers by their probability, in the bins of `Reliability`, for each head."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    for axes, (name, head) in zip(figure.subplots(1, len(heads)), heads.items(), strict=True):
        rows, right = np.array(head.rows), np.array(head.right)
        some = rows > 0
        share = right[some] / rows[some]
        axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1, label="as often right as it says")
        # One standard error of a share, by Wilson's estimate of it, which is not 0 where all or none are right.
        likely = (right[some] + 0.5) / (rows[some] + 1)
        error = np.sqrt(likely * (1 - likely) / rows[some])
        axes.errorbar(
            np.array(head.probability)[some] / rows[some], share, error, fmt="o", markersize=4, capsize=2, label="answers"
        )
        for x, y, count in zip(np.array(head.probability)[some] / rows[some], share, rows[some], strict=True):
            axes.annotate(f"{count:,}", (x, y), xytext=(-3, 5), textcoords="offset points", fontsize=7, ha="right")
        ece = head.metrics()["ece"]
        said = "" if ece is None else f", expected calibration error {ece:.4f}"
        axes.set(title=f"{name}{said}", xlabel="probability of the answer", ylabel="share that is right")
        axes.set(xlim=(-0.02, 1.04), ylim=(-0.05, 1.09))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", fontsize=8)
    return _png(figure)


def draw_probabilities(digit_prob: list[int], sum_prob: list[int]) -> bytes:
    """How sure a scoring run was: rows by probability of the answer, counts in bins of equal width over 0..1."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    width = 1 / len(digit_prob)
    edges = np.arange(len(digit_prob)) * width
    for axes, counts, name in zip(figure.subplots(1, 2, sharey=True), (digit_prob, sum_prob), ("digit", "sum"), strict=True):
        axes.bar(edges, counts, width=width, align="edge", edgecolor="white", linewidth=0.5)
        sure = counts[-1] / max(1, sum(counts))
        axes.set(title=f"{name}: {sure:.2%} of {sum(counts):,} rows above {1 - width:.2f}", xlabel=f"{name}_prob", xlim=(0, 1))
        axes.set_yscale("symlog", linthresh=1)  # most rows lie in the last bin, and those of interest do not
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("rows")
    return _png(figure)


def draw_rejects(reasons: dict[str, int]) -> bytes:
    """Rejected rows by reason, the commonest first."""
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


def _grid(axes: Axes, values: npt.NDArray[Any], texts: list[list[str]], colours: str, limits: tuple[float, float]) -> None:
    axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], alpha=0.75)
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    for (down, across), _ in np.ndenumerate(values):
        axes.text(across, down, texts[down][across], ha="center", va="center", fontsize=8)


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()

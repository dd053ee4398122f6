"""Pictures of training runs as PNG files, drawn from numbers that are also in the run's JSON files.

Blue is the digit, orange the sum: they differ with any kind of colour blindness.
"""

import io
from collections.abc import Callable, Iterable
from math import ceil
from typing import Any, Final

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mnistsum_ray.data.images import Pixels
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.optimizer import one_cycle

_STYLE: Final[dict[Any, Any]] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
}


def draw_history(history: list[dict[str, Any]], learning_rate: float) -> Figure:
    """Loss, learning rate with this peak, and error (100 % less the accuracy), by epoch."""
    figure = Figure(figsize=(9, 4))
    losses, errors = figure.subplots(1, 2)
    rates = losses.twinx()
    of_hundredths = [one_cycle(step, 101, learning_rate) for step in range(101)]
    rates.plot(np.linspace(0, len(history), 101), of_hundredths, "--", color="C4")
    rates.set_ylabel("learning rate (dashed)", color="C4")
    rates.grid(visible=False)
    epochs = [entry["epoch"] for entry in history]
    times, step_losses = [], []
    for entry in history:
        steps, losses_of_epoch = np.array(entry["step_losses"]).T
        times += [*(entry["epoch"] - 1 + steps / steps[-1])]
        step_losses += [*losses_of_epoch]
    losses.plot(times, step_losses, color="grey", linewidth=1, label="training")
    for split, line in (("validation", "o:"), ("test", "o-")):
        split_losses = [entry[split]["loss"] for entry in history]
        losses.plot(epochs, split_losses, line, color="black", label=split)
        for index, head in enumerate(HEADS):
            wrong = [100 - 100 * entry[split][f"{head.name}_accuracy"] for entry in history]
            errors.plot(epochs, wrong, line, color=f"C{index}", label=f"{head.name}, {split}")
    losses.set(title="loss, nats (mean of the heads)", xlabel="epoch", yscale="log")
    errors.set(title="error, %", xlabel="epoch")
    errors.set_yscale("symlog", linthresh=0.1)  # a few test rows may have no error at all
    errors.set_ylim(bottom=0)
    errors.yaxis.set_major_formatter("{x:g}")
    for axes in (losses, errors):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(loc="upper right")
    return figure


def draw_confusion(confusion: list[list[int]]) -> Figure:
    """Counts by true digit (down) and predicted digit (across)."""
    counts = np.array(confusion)
    figure = Figure(figsize=(6.5, 6))
    axes = figure.subplots()
    # On a logarithmic scale a mistake can be seen beside a thousand right ones.
    shades = LogNorm(0.5, max(10, counts.max()), clip=True)
    axes.imshow(counts, "Blues", norm=shades)
    axes.grid(visible=False)
    for (true, predicted), count in np.ndenumerate(counts):
        if count:
            color = "white" if shades(count) > 0.6 else "black"
            axes.text(predicted, true, f"{count:,}", ha="center", va="center", color=color)
    digits = range(len(counts))
    share = np.trace(counts) / counts.sum()
    axes.set_title(f"digits: {share:.2%} of {counts.sum():,} rows correct")
    axes.set(xlabel="predicted digit", ylabel="true digit", xticks=digits, yticks=digits)
    return figure


def draw_mistakes(mistakes: list[dict[str, Any]], images: Iterable[Pixels]) -> Figure:
    """Each mistake, as the manifest has it, with its image."""
    across = 6
    down = max(1, ceil(len(mistakes) / across))
    figure = Figure(figsize=(9, 0.6 + 2.1 * down))
    figure.suptitle(f"the {len(mistakes)} most confident mistakes")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, mistake, image in zip(panels, mistakes, images, strict=False):
        axes.imshow(image, "gray", vmin=0, vmax=255)  # as the data are, light or dark
        lines = [f"image + {mistake['number']}"]
        for head in HEADS:
            predicted = mistake[f"pred_{head.name}"]
            true = head.target(mistake["digit"], mistake["number"])
            wrong = "" if predicted == true else f", not {true}"
            lines.append(f"{head.name} {predicted} ({mistake[f'{head.name}_prob']:.0%}){wrong}")
        axes.set_title("\n".join(lines), fontsize=9)
    return figure


def draw_reliability(heads: dict[str, Any]) -> Figure:
    """Accuracy of each head by predicted probability; `heads` as `analyse_errors` returns them."""
    figure = Figure(figsize=(4.5 * len(heads), 4))
    panels = figure.subplots(1, len(heads), squeeze=False).ravel()
    for index, (name, head) in enumerate(heads.items()):
        counts = head["reliability"]
        rows = np.array(counts["rows"])
        used = rows > 0
        probabilities = np.array(counts["probability"])[used] / rows[used]
        accuracies = np.array(counts["right"])[used] / rows[used]
        axes = panels[index]
        axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1, label="perfect calibration")
        axes.plot(probabilities, accuracies, "o", color=f"C{index}", label="accuracy")
        for count, x, y in zip(rows[used], probabilities, accuracies, strict=True):
            options = {"textcoords": "offset points", "xytext": (-4, 4), "ha": "right"}
            axes.annotate(f"{count:,.0f}", (x, y), fontsize=7, **options)
        axes.set_title(f"{name}: expected calibration error {head['ece']:.4f}")
        axes.set(xlabel="predicted probability", ylabel="accuracy")
        axes.legend(loc="best")
    return figure


def draw_png(draw: Callable[..., Figure], *arguments: Any) -> bytes:
    """What `draw` draws of these arguments, in the common style, as the content of a PNG file."""
    file = io.BytesIO()
    # A user's matplotlibrc may ask for LaTeX, which may be missing.
    with style.context(["default", "tableau-colorblind10", _STYLE]):
        FigureCanvasAgg(draw(*arguments)).print_png(file)  # type: ignore[no-untyped-call]
    return file.getvalue()

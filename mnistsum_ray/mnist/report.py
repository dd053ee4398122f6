"""Tables and pictures for reports: blue is the digit, orange the sum, for the colour-blind too."""

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from mnistsum_ray.data.columns.base import Array, Arrays
from mnistsum_ray.errors import percent
from mnistsum_ray.mnist import DIGITS, HEADS, NUMBERS
from mnistsum_ray.task import Findings, Table

if TYPE_CHECKING:  # it takes a second to import, and what is drawn is drawn in another process
    from matplotlib.figure import Figure


def count(predicted: Arrays, batch: Arrays) -> dict[str, Any]:
    """Return counts of scored rows: numbers, or lists by digit, number or tenth of probability."""
    edges, numbers = batch["image"][:, [0, -1]], batch["number"]
    counts: dict[str, Any] = {
        "numbers": np.bincount(numbers, minlength=NUMBERS),
        "consistent": np.bincount(numbers[predicted["consistent"]], minlength=NUMBERS),
        # No image of MNIST has a light edge: these are black on white.
        "light_rows": (edges.mean((1, 2)) > 127).sum(),
        "predicted_digits": np.bincount(predicted["pred_digit"], minlength=DIGITS),
    }
    for head in HEADS:
        tenths = (10 * predicted[f"{head}_prob"]).astype(np.int64).clip(max=9)
        counts[f"{head}_probabilities"] = np.bincount(tenths, minlength=10)
    if "digit" in batch:
        cells = DIGITS * batch["digit"] + predicted["pred_digit"]
        counts["confusion"] = np.bincount(cells, minlength=DIGITS**2).reshape(DIGITS, DIGITS)
    return counts


def describe(counts: Mapping[str, Any]) -> Findings:
    """Return tables of `count`, and a notice where most images are light."""
    digits, notice = [f"{rows:,}" for rows in counts["predicted_digits"]], ""
    light = counts["light_rows"] / sum(counts["predicted_digits"])
    if light > 0.5:
        light_images = f"{percent(light)} of the images are light at their edges"
        notice = f"{light_images}; the model was trained on white on black"
    numbers = []
    for number, rows in enumerate(counts["numbers"]):
        consistent = percent(counts["consistent"][number] / rows) if rows else ""
        numbers.append((number, f"{rows:,}", consistent))
    tenths = []
    for tenth in range(10):
        of_heads = [f"{counts[f'{head}_probabilities'][tenth]:,}" for head in HEADS]
        tenths.append((f"{tenth / 10} to {(tenth + 1) / 10}", *of_heads))
    tables: list[Table] = [
        ("Predicted digits", ("digit", "rows"), list(enumerate(digits))),
        ("Numbers", ("number", "rows", "sum is digit + number"), numbers),
        ("Probabilities", ("probability", *(f"{head}, rows" for head in HEADS)), tenths),
        confusion_table(counts.get("confusion", [])),
    ]
    return Findings(tables=tables, notice=notice)


def confusion_table(confusion: list[list[int]]) -> Table:
    """Return rows by true digit (down) and predicted digit (across), and the correct ones."""
    rows = []
    for digit, predicted in enumerate(confusion):
        correct = percent(predicted[digit] / sum(predicted)) if any(predicted) else ""
        rows.append((digit, *predicted, correct))
    columns = ("", *range(DIGITS), "correct")
    return "Digits: true (down) and predicted (across)", columns, rows


def draw_mistakes(mistakes: list[dict[str, Any]], images: Array) -> "Figure":
    """Return each mistake, as the manifest has it, with its image of uint8[m, 28, 28]."""
    from matplotlib.figure import Figure

    across = 6
    down = max(1, ceil(len(mistakes) / across))
    figure = Figure(figsize=(9, 0.6 + 2.1 * down))
    figure.suptitle(f"the {len(mistakes)} most confident mistakes")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, mistake, image in zip(panels, mistakes, images, strict=False):
        axes.imshow(image, "gray", vmin=0, vmax=255)  # as the data are, light or dark
        digit, number = mistake["digit"], mistake["number"]
        lines = [f"image + {number}"]
        for head, true in zip(HEADS, (digit, digit + number), strict=True):
            predicted = mistake[f"pred_{head}"]
            wrong = "" if predicted == true else f", not {true}"
            lines.append(f"{head} {predicted} ({mistake[f'{head}_prob']:.0%}){wrong}")
        axes.set_title("\n".join(lines), fontsize=9)
    return figure


def draw_reliability(heads: dict[str, Any]) -> "Figure":
    """Accuracy of each head by predicted probability; `heads` as `analyse_errors` returns them."""
    from matplotlib.figure import Figure

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

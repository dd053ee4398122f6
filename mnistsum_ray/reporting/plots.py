"""Pictures of training runs as PNG files, drawn from numbers that are also in the run's JSON files.

The colours of metrics differ with any kind of colour blindness.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mnistsum_ray.model.schedule import one_cycle
from mnistsum_ray.reporting.console import short_name

_STYLE: Final[dict[Any, Any]] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
}


def draw_history(history: Sequence[dict[str, Any]], learning_rate: float) -> Figure:
    """Loss, learning rate with this peak, and the task's metrics, by epoch."""
    test = history[-1]["test"]
    names = [name for name, value in test.items() if isinstance(value, float) and name != "loss"]
    accuracies = [name for name in names if name.endswith("accuracy")]
    others = [name for name in names if name not in accuracies]
    groups = [group for group in (accuracies, others) if group]
    figure = Figure(figsize=(4.5 * (1 + len(groups)), 4))
    losses, *panels = figure.subplots(1, 1 + len(groups), squeeze=False)[0]
    _draw_loss(losses, history, learning_rate)
    for axes, group in zip(panels, groups, strict=True):
        is_error = group is accuracies
        for index, name in enumerate(group):
            for split, line in (("validation", "o:"), ("test", "o-")):
                values = np.array([entry[split][name] for entry in history])
                values = 100 - 100 * values if is_error else values
                label = f"{short_name(name)}, {split}"
                epochs = [entry["epoch"] for entry in history]
                axes.plot(epochs, values, line, color=f"C{index}", label=label)
        axes.set(title="error, %" if is_error else "metrics", xlabel="epoch")
        if is_error:  # on a few test rows there may be none
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:g}")
        _finish(axes)
    return figure


def _draw_loss(axes: Axes, history: Sequence[dict[str, Any]], learning_rate: float) -> None:
    rates = axes.twinx()
    of_hundredths = [one_cycle(step, 101, learning_rate) for step in range(101)]
    rates.plot(np.linspace(0, len(history), 101), of_hundredths, "--", color="C4")
    rates.set_ylabel("learning rate (dashed)", color="C4")
    rates.grid(visible=False)
    times: list[float] = []
    step_losses: list[float] = []
    for entry in history:
        steps, losses_of_epoch = np.array(entry["step_losses"]).T
        times += [*(entry["epoch"] - 1 + steps / steps[-1])]
        step_losses += [*losses_of_epoch]
    axes.plot(times, step_losses, color="grey", linewidth=1, label="training")
    for split, line in (("validation", "o:"), ("test", "o-")):
        split_losses = [entry[split]["loss"] for entry in history]
        axes.plot(
            [entry["epoch"] for entry in history], split_losses, line, color="black", label=split
        )
    is_positive = min(step_losses) > 0
    axes.set(title="loss", xlabel="epoch", yscale="log" if is_positive else "linear")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="upper right")


def draw_png(draw: Callable[..., Figure], *arguments: Any) -> bytes:
    """Return what `draw` draws of these arguments, in the common style, as PNG bytes."""
    file = io.BytesIO()
    # A user's matplotlibrc may ask for LaTeX, which may be missing.
    with style.context(["default", "tableau-colorblind10", _STYLE]):
        FigureCanvasAgg(draw(*arguments)).print_png(file)  # type: ignore[no-untyped-call]
    return file.getvalue()

"""Lines of the console, in a log and on a terminal."""

import io
from typing import Any

from mnistsum_ray.reporting.console import Console

TEST = {"rows": 10, "pairs": 100, "loss": 0.25, "digit_accuracy": 0.9946, "sum_accuracy": 0.9927}
ENTRY: dict[str, Any] = {
    "epoch": 2, "train_loss": 0.5, "rows_per_second": 1234.0, "waiting": 0.01, "best": True, "test": TEST,
}  # fmt: skip
PROGRESS = {
    "kind": "progress", "epoch": 1, "epochs": 5, "rows": 5000, "of_rows": 10_000, "rows_per_second": 1000.0, "loss": 1.5,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_epoch_line_has_the_figures_of_the_original() -> None:
    out = io.StringIO()
    Console(out).show({"kind": "epoch", **ENTRY})
    for figure in ("epoch 2", "train loss 0.5000", "test loss 0.2500", "digit 99.46%", "sum 99.27%", "1,234 rows/s"):
        assert figure in out.getvalue()
    assert out.getvalue().endswith(", selected by validation\n")


def test_progress_is_a_line_in_a_log_and_is_overwritten_on_a_terminal() -> None:
    log, terminal = io.StringIO(), Terminal()
    for out in (log, terminal):
        console = Console(out)
        console.show(PROGRESS)
        console.say("done")
    assert "5,000 of 10,000 rows" in log.getvalue()
    assert log.getvalue().count("\n") == 2
    assert "5 s left in this epoch, 45 s in all" in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().endswith("\rdone\n")

"""What a person sees."""

import io
import time
from typing import Any

import pytest

from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.progress import Progress

TEST = {"rows": 10, "pairs": 100, "loss": 0.25, "digit_accuracy": 0.9946, "sum_accuracy": 0.9927}
ENTRY: dict[str, Any] = {
    "epoch": 2, "train_loss": 0.5, "rows_per_second": 1234.0, "waiting": 0.01, "best": True, "test": TEST,
}  # fmt: skip
PROGRESS = {
    "kind": "progress", "epoch": 1, "epochs": 5, "rows": 5000, "of_rows": 10_000, "rows_per_second": 1000.0, "loss": 1.5,
}  # fmt: skip


def test_a_silence_is_said_and_a_word_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnistsum_ray.reporting.console.SILENCE_SECONDS", 0.2)
    out = io.StringIO()
    with Console(out).breaking_silence(lambda: "the cluster has 2 CPUs") as heard:
        for _ in range(10):
            time.sleep(0.05)
            heard()
        assert not out.getvalue()
        time.sleep(0.5)
    lines = out.getvalue().splitlines()
    assert lines == [f"no word from the workers for {seconds} s: the cluster has 2 CPUs" for seconds in (0.2, 0.4)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_epoch_line_has_the_figures_of_the_original() -> None:
    out = io.StringIO()
    Console(out).show({"kind": "epoch", **ENTRY})
    for figure in ("epoch 2", "train loss 0.5000", "test loss 0.2500", "digit 99.46%", "sum 99.27%", "1,234 rows/s"):
        assert figure in out.getvalue()


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


def test_what_takes_long_says_how_far_it_is_and_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0, 12.0, 20.0])
    monkeypatch.setattr("mnistsum_ray.reporting.progress.time.monotonic", lambda: next(clock))
    said: list[str] = []
    progress = Progress(said.append, "rows written", 3000)
    for _ in range(5):
        progress(600)
    assert said == [
        "rows written: 1,200 of 3,000  200/s  9 s left",
        "rows written: 2,400 of 3,000  200/s  3 s left",
    ]

"""The report page, with all optional parts and with none; the model card, and the versions of a manifest."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.reporting import pictures
from mnistsum_ray.reporting.report import model_card, report_page, versions, wilson_interval
from tests.reporting.test_tensorboard import entry

TEST = entry(1)["test"]
CARD: dict[str, Any] = {"parameters": 220_125, "sha256": "f" * 64, "epoch": 1, "sum_head": None, "test": TEST}
TUNED = {
    "steps": 4000,
    "kept": True,
    "before": {"validation": TEST, "test": TEST | {"sum_accuracy": 0.7654}},
    "after": {"validation": TEST, "test": TEST},
}
INT8 = {"digit_agreement": 0.9998, "sum_agreement": 0.9997}
HEAD = {"nll": 0.0133, "brier": 0.006, "ece": 0.0008}
NAMES = [head.name for head in HEADS]
PROBABILITIES = {"consistent": 0.99987} | dict.fromkeys(NAMES, HEAD) | {"sum": HEAD | {"ece": 0.9912}}
ALL = {"int8": INT8, "sum_head": TUNED, "temperatures_in_weights": dict.fromkeys(NAMES, 1.1), "probabilities": PROBABILITIES}
MANIFEST: dict[str, Any] = {
    "config": {"seed": 0, "name": "a <b> & c"},
    "versions": {"ray": "2.60.0"},
    "started": "2026-11-27T06:00:00+00:00",
    "workers": "1 CPU worker",
    "hardware": {"cpu": "a CPU", "cores": 2, "instructions": [], "gpu": None},
    "precision": "fp32",
    "data": {
        "source": "sample",
        "location": "/somewhere",
        "notice": None,
        "sha256": "0" * 64,
        "train_rows": 4000,
        "validation_rows": 500,
        "test_rows": 500,
    },
    "metrics": {"run": "/runs/mine", "images_per_second": 1234.5, "seconds": 61.2},
}


@pytest.mark.parametrize("card", [CARD, CARD | ALL], ids=["without optional parts", "with all parts"])
def test_the_page_shows_what_the_run_has(card: dict[str, Any]) -> None:
    page = report_page("mine", MANIFEST, card, [entry(1), entry(2)], {"history.png": pictures.draw_history([entry(1)], CARD)})
    for shown in ("91.00 %", "80.00 %", "1,234 training images", "a CPU, 2 cores", "--model '/runs/mine'", "a &lt;b&gt; &amp; c"):
        assert shown in page.replace("</b>", ""), shown
    assert ("99.98 %" in page) == ("int8" in card)
    assert ("4,000 steps" in page) == ("76.54 %" in page) == bool(card["sum_head"])
    assert ("99.987 %" in page) == ("0.9912" in page) == ("probabilities" in card)
    assert "<b> & c" not in page
    assert page.count("(95&nbsp;%: ") == len(HEADS)
    assert "2026-11-27T06:00:00+00:00" in page
    assert page.count("data:image/png;base64,") == 1


def test_the_page_shows_the_notice_about_the_data() -> None:
    manifest = json.loads(json.dumps(MANIFEST))
    manifest["data"]["notice"] = "NOT the full MNIST"
    assert "NOT the full MNIST" in report_page("mine", manifest, CARD, [entry(1)], {})


@pytest.mark.parametrize(("share", "count"), [(0.9946, 10_000), (0.0, 50), (1.0, 7), (0.5, 100)])
def test_the_interval_of_a_share_is_wilsons(share: float, count: int) -> None:
    """By definition its ends are the shares from which the observed one is 1.96 standard errors away."""
    low, high = wilson_interval(share, count)
    assert low <= share <= high
    for end in (low, high):
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-6)


@pytest.mark.parametrize(("source", "datasets"), [("mnist", ["ylecun/mnist"]), ("parquet", None)])
def test_the_model_card_says_what_the_model_is(source: str, datasets: list[str] | None) -> None:
    """As the Hugging Face Hub reads it."""
    card = ModelCard(model_card("mine", CARD, MANIFEST["data"] | {"source": source}))
    assert isinstance(card.data, ModelCardData)
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == datasets
    results = [(result.metric_name, result.metric_value) for result in card.data.eval_results or []]
    assert results[:2] == [("digit accuracy", 0.91), ("sum accuracy", 0.8)]
    for shown in ("220,125 parameters", "91.00 %", "80.00 %", "4,000 images", "f" * 64):
        assert shown in card.text


@pytest.mark.slow
def test_a_git_that_does_not_answer_costs_the_commit_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nsleep 60\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    started = time.monotonic()
    assert {"python", "mnistsum_ray", "ray", "torch"} <= versions().keys() - {"commit"}
    assert time.monotonic() - started < 45

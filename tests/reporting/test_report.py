"""The report pages, with all optional parts and with none, and in a browser; and the model card."""

import io
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from mnistsum_ray.data.order import row_checksums
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.reporting import pictures
from mnistsum_ray.reporting.report import PICTURES, model_card, report_page, scored_page, wilson_interval
from mnistsum_ray.scoring.counts import RowCounts, encode_image
from tests.reporting.test_tensorboard import entry

TEST = entry(1)["test"]
CARD: dict[str, Any] = {"parameters": 220_125, "sha256": "f" * 64, "epoch": 1, "sum_head": None, "test": TEST}
CARD["input"] = {"image": "28 x 28, 0 ink", "background": 255}
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
    "training_seconds": 4321.0,
}


@pytest.mark.parametrize("card", [CARD, CARD | ALL], ids=["without optional parts", "with all parts"])
def test_the_page_shows_what_the_run_has(card: dict[str, Any]) -> None:
    manifest = MANIFEST | {"data": MANIFEST["data"] | {"notice": "NOT the full MNIST"}}
    page = report_page("mine", manifest, card, [entry(1), entry(2)], {"history.png": pictures.draw_history([entry(1)], CARD)})
    for shown in (
        "91.00 %",
        "80.00 %",
        "1,234 training images",
        "4,321 s for the epochs",
        "took 61 s",
        "a CPU, 2 cores",
        "--model '/runs/mine'",
        "a &lt;b&gt; &amp; c",
        "NOT the full MNIST",
    ):
        assert shown in page.replace("</b>", ""), shown
    assert ("99.98 %" in page) == ("int8" in card)
    assert ("4,000 steps" in page) == ("76.54 %" in page) == bool(card["sum_head"])
    assert ("99.987 %" in page) == ("0.9912" in page) == ("probabilities" in card)
    assert "<b> & c" not in page
    assert page.count("(95&nbsp;%: ") == len(HEADS)
    assert "2026-11-27T06:00:00+00:00" in page
    assert page.count("data:image/png;base64,") == 1


@pytest.mark.parametrize(("share", "count"), [(0.9946, 10_000), (0.0, 50), (1.0, 7), (0.5, 100)])
def test_the_interval_of_a_share_is_wilsons(share: float, count: int) -> None:
    """By definition its ends are the shares from which the observed one is 1.96 standard errors away."""
    low, high = wilson_interval(share, count)
    assert low <= share <= high
    for end in (low, high):
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-6)


@pytest.mark.parametrize("of_mnist", [True, False])
def test_the_model_card_says_what_the_model_is(of_mnist: bool) -> None:
    """As the Hugging Face Hub reads it. Other data may come as IDX files too, as KMNIST does."""
    sample = open_source("sample")
    images, digits = sample.data.fetch(np.arange(sample.rows))
    checksums = row_checksums(np.arange(sample.rows), images, digits if of_mnist else 9 - digits).sum(keepdims=True)
    card = ModelCard(model_card("mine", CARD, MANIFEST["data"] | {"sha256": sample.content_sha256(checksums)}))
    assert isinstance(card.data, ModelCardData)
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == (["ylecun/mnist"] if of_mnist else None)
    results = [(result.metric_name, result.metric_value) for result in card.data.eval_results or []]
    assert results[:2] == [("digit accuracy", 0.91), ("sum accuracy", 0.8)]
    for shown in ("220,125 parameters", "91.00 %", "80.00 %", "4,000 images", "f" * 64, "(28 x 28, 0 ink)", "black on white"):
        assert shown in card.text


SCORED: dict[str, Any] = {
    "totals": {
        "output": "/out",
        "input_rows": 9,
        "scored_rows": 8,
        "rejected_rows": 1,
        "failed_rows": 0,
        "files": 2,
        "failed_files": 0,
        "rows_per_second": 7.5,
    }
    | {f"{head.name}_accuracy": 0.75 for head in HEADS},
    "labelled_rows": 8,
    "finished": "2026-11-27T06:00:00+00:00",
    "config": {"input": "/a/folder", "model": "/a/model", "label_column": "digit"},
    "versions": {"ray": "2.60.0"},
    "model": {"sha256": "f" * 64},
    "precision": "fp32",
}
FILE = "folder/a_long_name_of_a_file.parquet"
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 28, 28)).astype(np.uint8)
COUNTS = RowCounts(
    reasons={"the number is 44, not one of 0..9; correct it or drop the row": 1},
    examples={"the number is 44, not one of 0..9; correct it or drop the row": [[FILE, 3]]},
    unsure=[[0.1 * row, FILE, row, 4, 5, (9, 4, None, 4)[row], encode_image(image)] for row, image in enumerate(IMAGES)],
)


def scored() -> str:
    return scored_page(SCORED, COUNTS, {"Confusion": pictures.draw_confusion(COUNTS.confusion, "labelled rows")})


def test_control_characters_are_escaped_on_every_page() -> None:
    """A file name or a message of the storage may hold them, and a page is read in terminals too."""
    raw, shown, reason = "a\x1b]0;b\x07", r"a\x1b]0;b\x07", "is\x1b[2J"
    counts = RowCounts(reasons={reason: 1}, examples={reason: [[raw, 3]]}, unsure=[[0.1, raw, 0, 1, 2, None, "aGk="]])
    pages = [
        scored_page(SCORED | {"config": SCORED["config"] | {"input": raw}}, counts, {}),
        report_page(raw, MANIFEST | {"config": {"name": raw, "paths": [raw]}}, CARD, [entry(1)], {}),
        model_card(raw, CARD, MANIFEST["data"] | {"location": raw}),
    ]
    for page in pages:
        assert shown in page
        assert page.replace("\n", "").isprintable()


def trained() -> str:
    drawn = pictures.draw_confusion(np.eye(10, dtype=int).tolist())
    return report_page("mine", MANIFEST, CARD | ALL, [entry(1), entry(2)], dict.fromkeys(PICTURES, drawn))


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("takes Chromium and its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    started = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield started
    started.quit()


def show(browser: webdriver.Chrome, page: str, folder: Path, width: int, scheme: str = "light") -> None:
    """Open a page in a window of this width."""
    place = folder / "report.html"
    place.write_text(page)
    size = {"width": width, "height": 4000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(place.as_uri())


SCROLLED = """
return [...document.querySelectorAll(".wide")].map(box => { box.scrollLeft = 50; return box.scrollLeft > 0 })"""
"""Whether each box can be scrolled sideways."""


@pytest.mark.parametrize("make", [scored, trained])
def test_a_page_fits_its_window_and_what_is_wider_scrolls(browser: webdriver.Chrome, make: Any, tmp_path: Path) -> None:
    page = make()
    for width in (400, 1280):
        show(browser, page, tmp_path, width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert any(browser.execute_script(SCROLLED)) == (width == 400)
        narrowest = browser.execute_script(
            "return Math.min(...[...document.querySelectorAll('figure img')].map(one => one.width / one.naturalWidth))"
        )
        assert narrowest > 0.4, "texts of 10 points of a 150th of an inch are at least 9 pixels"


def test_pictures_are_dark_on_light_or_light_on_dark(browser: webdriver.Chrome, tmp_path: Path) -> None:
    page, greys = scored(), {}
    for scheme in ("light", "dark"):
        show(browser, page, tmp_path, 1280, scheme)
        shot = browser.find_element(By.CSS_SELECTOR, "figure img").screenshot_as_png
        greys[scheme] = np.asarray(Image.open(io.BytesIO(shot)).convert("L"))
    for grey in greys.values():
        assert grey.max() - grey.min() > 200
    assert np.median(greys["light"]) > 240
    assert np.median(greys["dark"]) < 30


def test_the_least_sure_rows_are_shown_with_image_label_and_file() -> None:
    def lines(page: str) -> list[str]:
        table = page.partition('<table class="unsure">')[2].partition("</table>")[0]
        return [" ".join(re.sub("<[^>]+>", " ", line).split()) for line in table.split("</tr>")]

    page = scored_page(SCORED, COUNTS, {})
    assert lines(page)[0] == "image predicted digit digit_prob digit number input row"
    assert lines(page)[1:3] == [f"4 0.000 9 5 {FILE}, row 0", f"4 0.100 4 5 {FILE}, row 1"]
    assert lines(page)[3] == f"4 0.200 unknown 5 {FILE}, row 2"
    assert re.findall(r'class="wrong">(\w+)<', page) == ["9"]
    assert len({*re.findall(r'class="digit" alt="[^"]+" src="([^"]+)"', page)}) == len(IMAGES)
    totals = {name: value for name, value in SCORED["totals"].items() if "accuracy" not in name}
    page = scored_page(SCORED | {"labelled_rows": None, "totals": totals}, COUNTS, {})
    assert lines(page)[:2] == ["image predicted digit digit_prob number input row", f"4 0.000 5 {FILE}, row 0"]

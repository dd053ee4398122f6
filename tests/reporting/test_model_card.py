"""The model card, as the Hugging Face Hub reads it."""

from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from mnistsum_ray.reporting.model_card import model_card

CARD: dict[str, Any] = {
    "parameters": 220_125,
    "sha256": "ab" * 32,
    "test": {"rows": 10_000, "pairs": 100_000, "loss": 0.0151, "digit_accuracy": 0.9949, "sum_accuracy": 0.9948},
}
DATA: dict[str, Any] = {"location": "/mine", "train_rows": 55_000, "validation_rows": 5_000, "test_rows": 10_000}


@pytest.mark.parametrize(("source", "datasets"), [("mnist", ["ylecun/mnist"]), ("parquet", None)])
def test_the_card_says_what_the_model_is(source: str, datasets: list[str] | None) -> None:
    card = ModelCard(model_card("mine", CARD, DATA | {"source": source}))
    assert isinstance(card.data, ModelCardData)
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == datasets
    assert [(result.metric_name, result.metric_value) for result in card.data.eval_results or []] == [
        ("digit accuracy", 0.9949),
        ("sum accuracy", 0.9948),
    ]
    for shown in ("220,125 parameters", "99.49 %", "99.48 %", "55,000 images", "ab" * 32):
        assert shown in card.text

"""Model card: `README.md` in the model folder, in the form that the Hugging Face Hub reads."""

from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mnistsum_ray.model.heads import HEADS

MODEL_CARD: Final = "README.md"

_MNIST: Final = "ylecun/mnist"
"""Name of MNIST on the Hub."""

_TEMPLATE: Final = Path(__file__).with_name("model_card.md.j2")


def model_card(name: str, card: dict[str, Any], data: dict[str, Any]) -> str:
    """Render the model card.

    Args:
        name: of the run.
        card: contents of model.json.
        data: entry `data` of manifest.json.
    """
    of_mnist = data["source"] in ("mnist", "sample")
    results = [
        EvalResult(
            task_type="image-classification",
            task_name=f"{head.name} of image and number",
            dataset_type=_MNIST if of_mnist else "other",
            dataset_name="MNIST" if of_mnist else data["location"],
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"{head.name} accuracy",
            metric_value=card["test"][f"{head.name}_accuracy"],
        )
        for head in HEADS
    ]
    fields = ModelCardData(
        license="apache-2.0",
        library_name="pytorch",
        tags=["mnist", "ray"],
        datasets=[_MNIST] if of_mnist else None,
        model_name=name,
        eval_results=results,
    )
    rendered: ModelCard = ModelCard.from_template(
        fields, template_path=str(_TEMPLATE), name=name, card=card, data=data, heads=[head.name for head in HEADS]
    )
    return str(rendered)

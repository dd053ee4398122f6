"""Export a model for programs without this package: torch.export (model.pt2) and ONNX (model.onnx).

    mnistsum export-model --model runs/mine --output exported/

Both take images uint8[n, 28, 28] and numbers int64[n], and return pred_digit, digit_prob, pred_sum
and sum_prob as in scored files. Each file is loaded again and compared with the model, the ONNX
file in ONNX Runtime. Needs the extra onnx.

The last line on standard output is one JSON object. Exit codes: 0 done, 2 the request is invalid,
1 anything else.
"""

from importlib.util import find_spec
from typing import Any

from mnistsum_ray import cli


def run(argv: list[str]) -> tuple[dict[str, Any], int]:
    """Run the job; return its result and its exit code."""
    from mnistsum_ray.arguments import parse  # imported here, after cli.run has begun to catch signals
    from mnistsum_ray.config import ExportModelConfig
    from mnistsum_ray.errors import RequestError

    config = parse(ExportModelConfig, argv, __doc__)

    cli.reserve_stdout_for_result()
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise RequestError(f"ONNX export needs packages that are not installed ({', '.join(missing)}): pip install -e '.[onnx]'")

    from mnistsum_ray.export.model import export_model  # imports torch, which takes seconds: after the checks
    from mnistsum_ray.reporting.console import Console

    return export_model(config, Console().say), cli.DONE

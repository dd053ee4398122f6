"""Write a model as one ONNX file. Needs: pip install onnx onnxruntime onnxscript

python jobs/examples/onnx_export.py --model runs/mine --output model.onnx

Inputs: image uint8[n, 28, 28], 255 is ink; number int64[n]; others than 0..9 get -1 and NaN.
"""

import argparse

import onnxruntime
import torch
from torch import Tensor, nn

from mnistsum_ray import load_model


class FromPixels(nn.Module):
    network: nn.Module

    def forward(self, image: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        known = number.clamp(0, 9)  # ONNX would count -1 from the end, and answer for 9
        outputs: list[Tensor] = []
        for logits in self.network({"image": image, "number": known}):
            probability, answer = logits.softmax(1).max(1)
            outputs.append(answer.where(number == known, -1))
            outputs.append(probability.where(number == known, torch.nan))
        return tuple(outputs)


parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", default="model.onnx")
args = parser.parse_args()
model = FromPixels().eval()
model.network = load_model(args.model)
pairs = (torch.randint(0, 256, (120, 28, 28), dtype=torch.uint8), torch.arange(120) % 12 - 1)
names = ["pred_digit", "digit_prob", "pred_sum", "sum_prob"]
rows = [{0: torch.export.Dim("rows")}] * 2
torch.onnx.export(
    model, pairs, args.output, output_names=names, dynamic_shapes=rows, external_data=False
)
given = {"image": pairs[0].numpy(), "number": pairs[1].numpy()}
answers = map(torch.from_numpy, onnxruntime.InferenceSession(args.output).run(None, given))
torch.testing.assert_close(tuple(answers), model(*pairs), atol=1e-3, rtol=0, equal_nan=True)

"""The parts of a network, found by running it on a few rows: the optimizer, fine-tuning and calibration name no layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnistsum_ray.data.images import SIDE
from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.heads import DIGIT, HEADS, NETWORK
from mnistsum_ray.model.network import LAYERS, Network, make_network, prepare_images


@dataclass(frozen=True)
class Parts:
    """Parts of a network, each in the order of its modules."""

    hidden_weights: list[Tensor]
    """Weights of LAYERS, except those of the first layer and of the last ones."""
    head_parameters: list[nn.Parameter]
    """Parameters of the heads that read the digit scores."""
    last_layers: dict[str, nn.Module]
    """The last of LAYERS before the scores of each head, by the head's name."""
    calls: list[tuple[nn.Module, tuple[Tensor], Tensor]]
    """Calls of LAYERS: layer, inputs and output."""
    digit_scores: Tensor

    @torch.no_grad()
    def fold_temperatures(self, temperatures: Mapping[str, float]) -> None:
        """Divide the scores of each head by its temperature, in place, by changing the weights."""
        # Here, and not when the parts are found: on fake tensors values cannot be compared.
        digits, linear = slice(DIGIT.classes), [call for call in self.calls if isinstance(call[0], nn.Linear) and call[1]]
        readers = {layer for layer, (given,), _ in linear if torch.equal(given[:, digits], self.digit_scores)}
        for name, layer in self.last_layers.items():
            for parameter in layer.parameters():
                parameter.div_(temperatures[name])
        for reader in readers:  # they still read the digit scores as they were
            reader.get_parameter("weight")[:, digits] *= temperatures[DIGIT.name]


def _example_rows(device: torch.device) -> tuple[Tensor, Tensor]:
    """Prepared images of random pixels, and numbers; always the same four."""
    generator = torch.Generator(device).manual_seed(0)
    pixels = torch.randint(256, (4, SIDE, SIDE), generator=generator, device=device, dtype=torch.uint8)
    return prepare_images(pixels), torch.arange(4, device=device)


@torch.enable_grad()
def find_parts(model: Network) -> Parts:
    """Find the parts of a network: which layers come before which scores is known from gradients. The network does not change.

    Raises:
        RequestError: a parameter gets no gradient, or a part is missing.
    """
    calls: list[Any] = []
    layers = [layer for layer in model.modules() if isinstance(layer, LAYERS)]
    hooks = [layer.register_forward_hook(lambda *call: calls.append(call)) for layer in layers]
    training, parameters = model.training, dict(model.named_parameters())
    model.eval()  # the statistics of nn.BatchNorm2d stay as they are
    images, numbers = _example_rows(next(model.parameters()).device)
    digit_scores = model.digit_scores(images)
    scores = digit_scores, *model.scores(digit_scores.detach().requires_grad_(), numbers)[1:]
    model.train(training)
    for hook in hooks:
        hook.remove()
    classes, expected = [list(values.shape[1:]) for values in scores], [[head.classes] for head in HEADS]
    if classes != expected:
        raise _refused(f"its `scores` are of {classes} classes, and HEADS of {expected}")
    sources = [value for value in (*(output for *_, output in calls), *parameters.values()) if value.requires_grad]
    reached, last_layers = list[set[Tensor]](), dict[str, nn.Module]()
    for head, values in zip(HEADS, scores, strict=True):
        gradients = torch.autograd.grad(values.sum(), sources, retain_graph=True, allow_unused=True)
        reached.append({source for source, gradient in zip(sources, gradients, strict=True) if gradient is not None})
        for layer, _, output in calls:
            if output in reached[-1]:
                last_layers[head.name] = layer
    if unused := [name for name, parameter in parameters.items() if parameter not in set().union(*reached)]:
        raise _refused(f"no gradient arrives at {', '.join(unused)}: use it, remove it, or make a constant a buffer")
    ends = {*last_layers.values(), *(layer for layer, *_ in calls[:1])}
    hidden = dict.fromkeys(layer.weight for layer in layers if layer not in ends)
    if not hidden or len(last_layers) < len(HEADS):
        raise _refused("it needs an nn.Linear or nn.Conv2d as the last layer of each head, and one between the first and these")
    of_heads = [parameter for parameter in parameters.values() if parameter in set().union(*reached[1:])]
    return Parts(list(hidden), of_heads, last_layers, calls, digit_scores)


@torch.no_grad()
def check_network(dropout: float) -> None:
    """Raise RequestError where a new network cannot be trained whole, with this probability of dropout, or be calibrated."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(0)
        model = make_network()
        for parameter in model.parameters():  # weights that begin as zeros would hide what they do
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
        images, numbers = _example_rows(torch.device("cpu"))
        if not torch.equal(model(images, numbers)[1], model(images, numbers)[1]):
            raise _refused("it draws random numbers, and a resumed run would draw others: take `dropout_shape`")
        before = model.eval()(images, numbers)
    if dropout:
        zeros = None if model.dropout_shape is None else torch.zeros(len(images), *model.dropout_shape)
        if torch.equal(model.digit_scores(images, zeros), before[0]):
            raise _refused(f"it does not use --dropout {dropout:g}: give --dropout 0, or multiply with it in `digit_scores`")
    temperatures = {head.name: 2.0 + index for index, head in enumerate(HEADS)}
    find_parts(model).fold_temperatures(temperatures)
    for head, scores, folded in zip(HEADS, before, model(images, numbers), strict=True):
        if not torch.allclose(folded * temperatures[head.name], scores, rtol=0, atol=1e-3 * scores.abs().max().item()):
            raise _refused(
                f"the head {head.name} cannot be calibrated: its scores must be those of an nn.Linear or nn.Conv2d of its own, "
                f"and it must read the digit scores as the first {DIGIT.classes} inputs of an nn.Linear"
            )


def _refused(reason: str) -> RequestError:
    return RequestError(f"the network {NETWORK} cannot be trained: {reason}")

"""What a network represents its inputs by: the values of its layers, those of linearised parts at theta included."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clkit import checks, tangent
from clkit.modules import evaluation_mode, hooked, unwrapped
from clkit.weights import Weights, set_weights


@torch.no_grad()
def activations(model: nn.Module, x: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The outputs of modules by name, from one pass of `x` (N, ...) in evaluation mode, in the order of the first runs.

    `layers` are names as `named_modules` gives them; None takes every module without children that has parameters. Of
    one that runs several times the last output counts; one that does not run is missing. Raises TypeError for modules
    that put out no tensor, ValueError for unknown names.
    """
    model = unwrapped(model)
    modules = tangent.layers(model)
    if layers is None:
        layers = [n for n, m in modules.items() if not any(m.children()) and any(True for _ in m.parameters())]
    check_layers(model, layers)
    seen: dict[str, Tensor] = {}

    def keep(name: str, out: object) -> None:
        if not isinstance(out, Tensor):
            raise TypeError(f"layers: {name!r} puts out a {type(out).__name__}, no tensor; name a module within it")
        seen[name] = tangent.linearised(out).clone()  # what follows may work in place

    hooks = [(modules[n], lambda _, __, out, n=n: keep(n, out)) for n in dict.fromkeys(layers)]
    with hooked(hooks), evaluation_mode(model):
        model(x)
    return seen


@checks.arguments
def features(
    model: nn.Module, x: Tensor, layer: str | None = None, *, weights: Weights | None = None, batch: checks.Count = 512
) -> Tensor:
    """The output (N, ...) of the module named `layer` for all of `x` (N, ...), or the inputs of the last linear one.

    In evaluation mode, `batch` rows at a time, with `weights` in place of the model's own if given. `x` is prepared
    input on the model's device. The inputs of the last `nn.Linear` that runs are (N, F), or (N, L, F) for tokens.
    Raises ValueError for an unknown layer, for one that does not run, and for empty `x`. Without a `layer` it also
    raises it for a model without a linear layer.
    """
    if not len(x):
        raise ValueError("x: there are no rows; pass at least one")
    model = with_weights(unwrapped(model), weights)
    if layer is None:
        return _last_inputs(model, x.split(batch))
    check_layers(model, [layer], "layer")
    found = [activations(model, part, [layer]) for part in x.split(batch)]
    if layer not in found[0]:
        raise ValueError(f"layer: {layer!r} does not run in the model's forward pass; name one that does")
    return torch.cat([values[layer] for values in found])


@torch.no_grad()
def _last_inputs(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """The inputs of the last linear layer that runs, for all batches."""
    last, parts = [], []
    linears = [m for m in tangent.layers(model).values() if isinstance(m, nn.Linear)]
    hooks = [(m, lambda _, inputs: last.__setitem__(slice(None), [tangent.linearised(inputs[0])])) for m in linears]
    with hooked(hooks, before=True), evaluation_mode(model):
        for part in batches:
            model(part)
            parts += last
    if not parts:
        name = type(model).__name__
        raise ValueError(f"model: {name} runs no nn.Linear, whose inputs would be its features; name a layer")
    return torch.cat(parts)


def with_weights(model: nn.Module, weights: Weights | None) -> nn.Module:
    """The model itself, or a copy of it that holds other weights; ValueError where they do not fit it."""
    if weights is None:
        return model
    scratch = copy.deepcopy(model)
    set_weights(scratch, weights)
    return scratch


def check_layers(model: nn.Module, layers: Sequence[str], argument: str = "layers") -> None:
    """Raises ValueError, with close names, unless a model has modules of those names."""
    names = tangent.layers(model).keys()
    for name in layers:
        checks.choice(argument, name, names)

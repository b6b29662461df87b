"""The values of a network's layers, by the name of a module."""

import copy
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from clkit import models
from clkit.tangent import Linearized, value
from clkit.tangent import layers as layers_of
from clkit.weights import Weights, evaluation_mode, set_weights

BATCH = 512


@torch.no_grad()
def activations(model: nn.Module, x: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The outputs of modules by name, from one pass of `x` in evaluation mode, in the order in which they first ran.

    `layers` are names as `named_modules` gives them; None takes every module without children that has parameters. Of
    one that runs several times the last output counts; one that does not run is missing. Modules that put out no
    tensor raise TypeError, unknown names ValueError.
    """
    modules = layers_of(model)
    if layers is None:
        layers = [n for n, m in modules.items() if not any(m.children()) and any(True for _ in m.parameters())]
    for name in layers:
        check_layer(model, name)
    seen: dict[str, Tensor] = {}

    def keep(name: str, out: object) -> None:
        if not isinstance(out, Tensor):
            raise TypeError(f"layers: {name!r} puts out a {type(out).__name__}, no tensor; name a module within it")
        seen[name] = value(out).clone()  # what follows may work in place

    hooks = [modules[n].register_forward_hook(lambda _, __, out, n=n: keep(n, out)) for n in dict.fromkeys(layers)]
    try:
        with evaluation_mode(model):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def features(
    model: nn.Module, x: Tensor, layer: str | None = None, *, weights: Weights | None = None, batch: int = BATCH
) -> Tensor:
    """The output (N, ...) of the module named `layer` for all of `x` (N, ...); None: the inputs of the last linear one.

    In evaluation mode, `batch` rows at a time, with `weights` in place of the model's own if given. Raises ValueError
    for an unknown layer, with close names, for one that does not run, and for empty `x`.
    """
    if not len(x):
        raise ValueError("x: there are no rows; pass at least one")
    if batch < 1:
        raise ValueError(f"batch: {batch!r}; give the number of rows to do at once, at least 1")
    model = with_weights(model, weights)
    if layer is not None:
        check_layer(model, layer)
    elif not any(isinstance(m, Linearized) for m in model.modules()):
        return models.features(model, x, batch=batch)
    return torch.cat([_rows(model, part, layer) for part in x.split(batch)])


def _rows(model: nn.Module, x: Tensor, layer: str | None) -> Tensor:
    """The features of one batch."""
    if layer is None:
        return _last_inputs(model, x)
    found = activations(model, x, [layer])
    if layer not in found:
        raise ValueError(f"layer: {layer!r} does not run in the model's forward pass; name one that does")
    return found[layer]


@torch.no_grad()
def _last_inputs(model: nn.Module, x: Tensor) -> Tensor:
    """The linearised inputs of the last linear layer that runs."""
    seen: list[Tensor] = []
    linears = [m for m in layers_of(model).values() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError("model: it has no nn.Linear, whose inputs would be its features; name a layer")
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(value(args[0]).clone())) for m in linears]
    try:
        with evaluation_mode(model):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[-1]


def with_weights(model: nn.Module, weights: Weights | None) -> nn.Module:
    """The model itself, or a copy of it that holds other weights."""
    if weights is None:
        return model
    scratch = copy.deepcopy(model)
    set_weights(scratch, weights)
    return scratch


def check_layer(model: nn.Module, name: str) -> None:
    """Raises ValueError, with close names, unless a model has a module of that name."""
    names = list(layers_of(model))
    if name not in names:
        close = get_close_matches(name, names, 4, cutoff=0.3)
        raise ValueError(f"layer: the model has no module {name!r}; did you mean one of {close or names[1:9]}?")


def samples(activation: Tensor) -> Tensor:
    """An activation as rows of units: places of images (N, C, H, W) and tokens (N, L, F) are samples of their own."""
    if activation.ndim == 1:
        return activation.unsqueeze(1)
    return (activation.movedim(1, -1) if activation.ndim > 3 else activation).flatten(0, -2)

"""Activation statistics after a merge: re-estimated BatchNorm, and REPAIR for any network.

Both take weights and give weights. The model only lends its architecture: afterwards its tensors, its modes and its
momenta are what they were. Inputs are prepared tensors on the device of the weights. Tensors that are not corrected
are those given, not copies.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from clkit import checks
from clkit.checks import Range, Share
from clkit.modules import called, evaluation_mode, frozen_modules, frozen_tensors, hooked, unwrapped
from clkit.weights import Weights, check_same, live_tensors

REPAIRED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
Chunk = Annotated[int, Range(2, means="so that there is a variance; 256 is usual")]
Hook = Callable[[str, Any, tuple[Tensor, ...], Tensor], Tensor | None]


class Moments:
    """Mean and variance of each channel over all batches added, pooled in double precision."""

    def __init__(self):
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Adds a batch of `count` values a channel, by its mean and biased variance, (channels) each.

        Pooled by the law of total variance.
        """
        total = self.count + count
        if not self.count:
            self.mean, self.squares = mean.double(), var.double() * count
        else:
            step = mean.double() - self.mean
            self.squares = self.squares + var.double() * count + step.square() * (self.count * count / total)
            self.mean = self.mean + step * (count / total)
        self.count = total

    def var(self, correction: int = 0) -> Tensor:
        """The variance (channels): biased with correction 0, unbiased with 1."""
        return self.squares / (self.count - correction)


def batchnorms(model: nn.Module) -> tuple[str, ...]:
    """The names of what `refresh` re-estimates: BatchNorm layers that keep running statistics and are not frozen."""
    norms = {m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    norms -= frozen_modules(model)
    return tuple(name for name, m in model.named_modules() if m in norms)


@checks.arguments
def refresh(model: nn.Module, weights: Weights, inputs: Tensor, *, batch: Chunk = 256) -> dict[str, Tensor]:
    """`weights` with the BatchNorm statistics re-estimated on `inputs` (N, ...); the rest is as given.

    One sweep in which BatchNorm, and nothing else (no dropout), is in training mode. Batches count by their number
    of values, pooled with the variance between their means; one batch gives its exact mean and unbiased variance.
    The former statistics have no influence. Rows are split evenly into batches of at most `batch`, or one more where
    a row would be left alone. Layers that do not run keep what they had. Without BatchNorm, when `batchnorms(model)`
    is empty, this is a no-op: nothing is run.

    Raises ValueError for weights that are not the model's, fewer than 2 rows, and `batch` below 2.

    Ref: the reset in REPAIR (Jordan et al., arXiv 2211.08403) and step 9 of CLeWI (arXiv 2404.04002). CLeWI's code
    counts a short last batch like a full one and leaves `momentum` at None; neither is done here.
    """
    parts, model = _split(inputs, batch), unwrapped(model)
    check_same(live_tensors(model), weights, names=("the model", "weights"))
    found = {name: Moments() for name in batchnorms(model)}
    if found:
        _sweep(model, weights, parts, found, partial(_standardise, found))
    return {**weights, **_statistics(found, weights)}


@checks.arguments
def repair(
    model: nn.Module, weights: Weights, *, ends: tuple[Weights, Weights], t: Share, inputs: Tensor, batch: Chunk = 256
) -> dict[str, Tensor]:
    """`weights` from between `ends` = (a, b), every channel's statistics moved to where they are between the ends'.

    REPAIR (Jordan et al., arXiv 2211.08403, section 4) rescales a channel X before its nonlinearity. Then, over
    `inputs` (N, ...), E[X] = (1-t) E[X_a] + t E[X_b] and std[X] = (1-t) std[X_a] + t std[X_b]. The affine map is folded
    into weight and bias: the architecture stays what it is. `weights` are usually `lerp(a, b, t)` with `b` aligned
    to `a`. At t = 0 and t = 1 the function of the end is kept.

    What the paper leaves open, and what is done here. X is the output of BatchNorm, whose running statistics are
    re-estimated too. It is also that of every convolution and linear layer that has a bias to keep the shift in;
    BatchNorm undoes what was done to a convolution before it. The last convolution or linear layer that runs (the
    classifier) is left alone. The ends are measured as they are used, in evaluation mode; the merged network in one
    sweep in which every layer sees inputs already corrected. A channel that is constant in the merged network cannot be
    scaled and is only shifted. BatchNorm without weight and bias is only re-estimated. The calls of a layer that runs
    several times are pooled. Frozen layers stay as they are.

    Raises ValueError as `refresh` does, and for t outside [0, 1].
    """
    parts, model = _split(inputs, batch), unwrapped(model)
    check_same(live_tensors(model), weights, *ends, names=("the model", "weights", "ends[0]", "ends[1]"))
    norms = batchnorms(model)
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if n in norms or isinstance(m, REPAIRED)}
    a = _measure(model, ends[0], parts, layers)
    still = frozen_tensors(model) | {_key(name, "weight") for name in [n for n in a if n not in norms][-1:]}
    free = [name for name in a if still.isdisjoint((_key(name, "weight"), _key(name, "bias")))]
    names = [name for name in free if name in norms or layers[name].bias is not None]
    b = _measure(model, ends[1], parts, names)
    aims = {n: (a[n].mean.lerp(b[n].mean, t), a[n].var().sqrt().lerp(b[n].var().sqrt(), t)) for n in names}
    found = {name: Moments() for name in names}

    def correct(name: str, layer: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if layer.weight is None:
            return _standardise(found, name, layer, args, out)
        values = args[0] if isinstance(layer, _BatchNorm) else out
        mean, var, count = _moments(values, _axis(layer))
        found[name].add(mean, var, count)
        shift, spread = (aim.to(out.dtype) for aim in aims[name])
        shape = [-1 if i == _axis(layer) % out.ndim else 1 for i in range(out.ndim)]
        factor, _ = _factor(layer, layer.weight, mean, var, spread)
        return (values - mean.view(shape)) * factor.view(shape) + shift.view(shape)

    _sweep(model, weights, parts, names, correct)
    merged = {**weights, **_statistics({name: found[name] for name in norms if name in found}, weights)}
    for name in names:
        if layers[name].weight is not None:
            _fold(merged, name, layers[name], found[name], *aims[name])
    return merged


def _split(inputs: Tensor, batch: int) -> tuple[Tensor, ...]:
    if len(inputs) < 2:
        raise ValueError(f"inputs: {len(inputs)} rows have no variance; give 2 or more, from the memory or the task")
    return inputs.tensor_split(min(-(-len(inputs) // batch), len(inputs) // 2))


def _sweep(model: nn.Module, weights: Weights, parts: Iterable[Tensor], names: Iterable[str], hook: Hook) -> None:
    """Runs the model in evaluation mode with `weights`; what `hook` returns replaces the output of a layer."""
    hooks = [(model.get_submodule(name), partial(hook, name)) for name in names]
    with torch.no_grad(), evaluation_mode(model), hooked(hooks):
        for rows in parts:
            called(model, weights, rows)


def _measure(model: nn.Module, weights: Weights, parts: Iterable[Tensor], names: Iterable[str]) -> dict[str, Moments]:
    """The moments of the outputs of those layers that run, in the order in which they run (last)."""
    found: dict[str, Moments] = {}

    def measure(name: str, layer: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        found[name] = found.pop(name, Moments())
        found[name].add(*_moments(out, _axis(layer)))

    _sweep(model, weights, parts, names, measure)
    return found


def _axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _moments(values: Tensor, axis: int) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel, and how many values it has; BatchNorm's kernel is the quickest."""
    if axis == -1:
        values = values.flatten(0, -2)
    mean, var = values.new_zeros(2, values.shape[1])
    F.batch_norm(values, mean, var, training=True, momentum=1.0)
    count = values.numel() // len(mean)
    return mean, var * ((count - 1) / count), count


def _standardise(found: dict[str, Moments], name: str, layer: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """What BatchNorm puts out in training mode; its statistics go to `found`."""
    mean, var = torch.zeros_like(layer.running_mean), torch.zeros_like(layer.running_var)  # a NaN times 0 stays one
    out = F.batch_norm(args[0], mean, var, layer.weight, layer.bias, training=True, momentum=1.0, eps=layer.eps)
    count = out.numel() // len(mean)
    found[name].add(mean, var * ((count - 1) / count), count)
    return out


def _factor(layer: Any, weight: Tensor, mean: Tensor, var: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """What takes a channel's standard deviation to `spread`, and where that can be: (channels) each.

    A channel that varies by no more than rounding does keeps 1. BatchNorm's standardised input has no sign: its weight
    keeps it.
    """
    alive = var > torch.finfo(weight.dtype).eps * mean.square()
    sign = 1 - 2 * (weight < 0).to(weight.dtype) if isinstance(layer, _BatchNorm) else 1.0
    return torch.where(alive, spread * sign / var.sqrt(), 1.0), alive


def _statistics(found: dict[str, Moments], weights: Weights) -> dict[str, Tensor]:
    pairs = {}
    for name, moments in found.items():
        if moments.count:
            mean, var = _key(name, "running_mean"), _key(name, "running_var")
            pairs[mean] = moments.mean.to(weights[mean].dtype)
            pairs[var] = moments.var(1).to(weights[var].dtype)
    return pairs


def _fold(merged: dict[str, Tensor], name: str, layer: Any, found: Moments, shift: Tensor, spread: Tensor) -> None:
    """Writes the affine map that took a layer's `found` statistics to `shift` and `spread` into its tensors."""
    weight, bias = merged[_key(name, "weight")], merged[_key(name, "bias")]
    factor, alive = _factor(layer, weight, found.mean, found.var(), spread)
    if isinstance(layer, _BatchNorm):
        weight, bias = torch.where(alive, factor * (found.var(1) + layer.eps).sqrt(), weight), shift
    else:
        weight, bias = weight * factor.view(-1, *[1] * (weight.ndim - 1)), (bias - found.mean) * factor + shift
    for kind, tensor in (("weight", weight), ("bias", bias)):
        merged[_key(name, kind)] = tensor.to(merged[_key(name, kind)].dtype)


def _key(name: str, tensor: str) -> str:
    return f"{name}.{tensor}".strip(".")

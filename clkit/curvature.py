"""How much each parameter matters to a model's outputs: Fisher information, MAS's sensitivity; Gram matrices of inputs.

Everything here is pure: gradients are taken one example at a time in evaluation mode on a copy of the model. Many
examples go at once, or one after the other where the network's operations cannot be batched so. Importances have one
entry for each parameter that wants a gradient, named as `get_weights` names it.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from clkit import checks
from clkit.data import IGNORED, cuts
from clkit.modules import called, hooked, unwrapped
from clkit.weights import Weights, set_weights

FisherLabels = Literal["sampled", "true", "exact", "weighted"]
LARGEST_CHUNK = 512
NUMBERS_AT_ONCE = 2**28  # of per-example gradients


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters that want a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@checks.arguments
def fisher(
    model: nn.Module,
    x: Tensor,
    *,
    labels: FisherLabels = "sampled",
    y: Tensor | None = None,
    space: Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk: checks.Count | None = None,
) -> dict[str, Tensor]:
    """The diagonal Fisher information: the mean over examples of the squared gradient of the log-likelihood.

    F_i = 1/N sum_n (d log p(y_n | x_n) / d theta_i)^2, for prepared inputs `x`. `labels` says where y_n comes from,
    which papers often leave open (van de Ven 2025, arXiv 2502.11756, compares the choices):

    - "sampled": drawn from the model's own prediction, one an example, with `generator`: the Fisher by Monte Carlo
    - "exact": the expectation over all classes under the model's prediction, at one pass for each class
    - "true": the labels `y`: the "empirical" Fisher, which vanishes where the data are fitted
    - "weighted": the labels `y`, each example's square times the probability of its label, as in Mammoth's online EWC:
      of the exact expectation the one term of that label, mostly a small one where the data are fitted

    `space` masks the classes of the prediction (True: competes) and broadcasts to the logits, as `Criterion.space`
    gives it. Logits of sequences (N, L, C) are an example each: log-likelihoods add up over positions, those whose `y`
    is -100 left out; "exact" and "weighted" are not offered for them. `chunk` examples are done at once (None: as many
    as keep the per-example gradients at 1 GiB in float32, at most 512), which changes nothing but the memory needed.

    Raises ValueError for labels that are missing or not one a row, for no rows, and for a model that wants no gradient.
    """
    if labels in ("true", "weighted") and y is None:
        raise ValueError(f'labels: "{labels}" needs the labels; pass y, or use labels="sampled", which draws them')
    if y is not None and len(y) != len(x):
        raise ValueError(f"y: it has {len(y)} rows and x has {len(x)}; pass one label for each row of x")
    net, chunk = _ready(model, x, chunk)
    with torch.no_grad():
        logits = torch.cat([net(part) for part in x.tensor_split([*cuts(len(x), chunk)])])
    if labels in ("exact", "weighted") and logits.ndim != 2:
        raise ValueError(f'labels: "{labels}" is for logits (N, C), not {tuple(logits.shape)}; use "sampled"')
    space = torch.ones((), dtype=torch.bool, device=x.device) if space is None else space
    space = space.expand(logits.shape)
    p = logits.masked_fill(~space, float("-inf")).softmax(-1)

    def surprise(logits: Tensor, space: Tensor, label: Tensor, scale: Tensor) -> Tensor:
        log_p = logits.masked_fill(~space, float("-inf")).log_softmax(-1)
        hit = log_p.gather(-1, label.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return -scale * torch.where(label == IGNORED, 0, hit).sum()

    def of(label: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return _mean_slopes(net, surprise, torch.square, (x, space, label, weight.sqrt()), chunk)

    if labels == "exact":
        classes = torch.arange(p.shape[-1], device=p.device)
        parts = [of(c.expand(len(x)), p[:, c]) for c in classes]
        return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
    if labels == "sampled":
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
        y = drawn if y is None else torch.where(y == IGNORED, y, drawn)
    assert y is not None
    return of(y, p.gather(1, y[:, None])[:, 0] if labels == "weighted" else p.new_ones(len(x)))


@checks.arguments
def sensitivity(model: nn.Module, x: Tensor, *, chunk: checks.Count | None = None) -> dict[str, Tensor]:
    """How much the squared length of the outputs reacts to each parameter.

    The mean over examples of |d ||f(x)||^2 / d theta_i|: the importance of Memory Aware Synapses (Aljundi et al. 2018,
    arXiv 1711.09601, eq. 4), which needs no labels. The inputs `x` (N, ...) are prepared; `chunk` is as in `fisher`.
    """
    net, chunk = _ready(model, x, chunk)
    return _mean_slopes(net, lambda logits: logits.square().sum(), torch.abs, (x,), chunk)


@checks.arguments
@torch.no_grad()
def grams(model: nn.Module, weights: Weights, x: Tensor, *, chunk: checks.Count = 64) -> dict[str, Tensor]:
    """The Gram matrices X^T X of the inputs of linear layers and convolutions, by the name of the layer's weight.

    For every `nn.Linear` that is called, X has a row for each input vector (in); for every ungrouped `nn.Conv2d` one
    for each place of the kernel (in x height x width, as a kernel is flattened, padding included). Sums over all rows,
    not means: what RegMean needs (arXiv 2212.09849). The model runs with `weights`, in evaluation mode, once over the
    prepared inputs `x`, `chunk` examples at a time. Layers that share a weight, and layers that are called several
    times, add up. Products and sums are in float32, or float64 for weights in float64: a square of `in` numbers a layer
    is much memory. The model itself is left alone. Raises ValueError for weights that are not the model's, or no rows.
    """
    net = _copied(model, x)
    set_weights(net, weights)
    names = {id(p): name for name, p in net.named_parameters()}
    found: dict[str, Tensor] = {}

    def add(layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        rows = input_rows(layer, inputs[0])
        name, gram = names[id(layer.weight)], rows.T @ rows
        found[name] = found[name].add_(gram) if name in found else gram

    plain = [m for m in net.modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)]
    hooks = [(m, add) for m in plain if id(m.weight) in names]  # a parametrized weight is no parameter
    with hooked(hooks, before=True):
        for part in x.split(chunk):
            net(part)
    return found


def input_rows(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """The rows that a layer's weight matrix multiplies: (N, in) for inputs x, at least in float32.

    Of a linear layer (..., in) that is every input vector. Of an ungrouped convolution (N, C, H, W) it is the patch at
    each place of the kernel, place by place: in x height x width numbers as a kernel is flattened, padding included.
    """
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode)  # pyright: ignore
        x = nn.functional.unfold(x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride).transpose(1, 2)
    return x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))


def ridge(design: Tensor, targets: Tensor, strength: float) -> Tensor:
    """The M (in, out) of least ||X M - Y||^2 + strength m ||M||^2, for a design X (N, in) and targets Y (N, out).

    m is the mean eigenvalue of X^T X, which makes `strength` a number without a unit. There is no bias: append a column
    of ones to X for one. M is 0 for a design of zeros.
    """
    gram = design.T @ design
    scale = gram.diagonal().mean()
    if not scale:
        return targets.new_zeros(design.shape[1], targets.shape[1])
    gram.diagonal().add_(strength * scale)
    return torch.linalg.solve(gram, design.T @ targets)


def diagonal_trace(diagonal: Mapping[str, Tensor]) -> float:
    """The sum of all entries of tensors of any shape, in double precision.

    That of the Fisher information is a measure of plasticity.
    """
    return float(torch.stack([t.double().sum() for t in diagonal.values()]).sum()) if diagonal else 0.0


def _ready(model: nn.Module, x: Tensor, chunk: int | None) -> tuple[nn.Module, int]:
    """A copy of the model in evaluation mode, and the number of examples to do at once."""
    net = _copied(model, x)
    count = sum(p.numel() for p in trainable(net).values())
    if not count:
        raise ValueError("model: it has no parameter that requires a gradient; there is nothing to measure")
    return net, chunk or max(1, min(LARGEST_CHUNK, NUMBERS_AT_ONCE // count))


def _copied(model: nn.Module, x: Tensor) -> nn.Module:
    if not len(x):
        raise ValueError("x: it has no rows; pass at least one example")
    net = copy.deepcopy(unwrapped(model))
    net.eval()
    return net


def _mean_slopes(
    net: nn.Module,
    objective: Callable[..., Tensor],
    size: Callable[[Tensor], Tensor],
    rows: tuple[Tensor, ...],
    chunk: int,
) -> dict[str, Tensor]:
    """The mean over examples of `size` of the gradient of objective(logits, *rest), for rows (x, *rest)."""
    live = trainable(net)
    parameters = {name: p.detach() for name, p in live.items()}

    def value(parameters: dict[str, Tensor], x: Tensor, *rest: Tensor) -> Tensor:
        return objective(called(net, parameters, (x.unsqueeze(0),)).squeeze(0), *rest)

    slopes = torch.func.vmap(torch.func.grad(value), in_dims=(None, *[0] * len(rows)))
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    # the attention that can be batched over examples; what torch batches by a loop of its own is no news
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        for part in zip(*(t.split(chunk) for t in rows), strict=True):
            try:
                found = slopes(parameters, *part)
            except (RuntimeError, ValueError):  # what vmap cannot do: recurrent cells, branches on values, dropout
                found = _one_by_one(net, objective, live, part)
            for name, slope in found.items():
                total[name] += size(slope).sum(0)
    return {name: t / len(rows[0]) for name, t in total.items()}


def _one_by_one(
    net: nn.Module, objective: Callable[..., Tensor], live: dict[str, nn.Parameter], rows: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """The gradient of objective(logits, *rest) for every row, by name: (N, ...) each, in one pass a row."""
    slopes = []
    for x, *rest in zip(*rows, strict=True):
        try:
            with torch.enable_grad():
                loss = objective(net(x.unsqueeze(0)).squeeze(0), *rest)
            slopes.append(torch.autograd.grad(loss, list(live.values()), materialize_grads=True))
        except (RuntimeError, ValueError) as error:
            bare = [n for n, m in net.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
            norms = f"; BatchNorm without statistics, here {bare[0]!r}, takes no single row" if bare else ""
            raise ValueError(
                f"model: {type(net).__name__} has no gradients for one example alone ({error}){norms}; let it take "
                "single rows, or use a rule that does without"
            ) from error
    return {name: torch.stack(found) for name, found in zip(live, zip(*slopes, strict=True), strict=True)}

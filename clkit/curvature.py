"""How much each parameter matters to a model's outputs: Fisher information, MAS's sensitivity; Gram matrices of inputs.

Everything here is pure: gradients are those of one example at a time, in evaluation mode on a copy of the model. Many
examples go at once: a linear layer's and a convolution's squares come from inputs and gradients of outputs. Examples go
one after the other where the network's operations cannot be batched so. Importances have one entry for each parameter
that wants a gradient, named as `get_weights` names it.
"""

import copy
import itertools
import warnings
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from clkit import checks
from clkit.data import IGNORED, cuts
from clkit.modules import called, hooked, unwrapped
from clkit.weights import Weights, set_weights

FisherLabels = Literal["sampled", "true", "exact", "weighted"]
LARGEST_CHUNK = 512
NUMBERS_AT_ONCE = 2**28  # of per-example gradients
NUMBERS_IN_A_PIECE = 2**20  # of a layer's unfolded inputs and gradients: what a cache holds


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
    as keep per-example gradients below 1 GiB in float32, at most 512), which changes nothing but the memory needed.

    Raises ValueError for labels that are missing or not one a row, for no rows, and for a model that wants no gradient.
    """
    if labels in ("true", "weighted") and y is None:
        raise ValueError(f'labels: "{labels}" needs the labels; pass y, or use labels="sampled", which draws them')
    if y is not None and len(y) != len(x):
        raise ValueError(f"y: it has {len(y)} rows and x has {len(x)}; pass one label for each row of x")
    net, chunk = _ready(model, x, chunk)
    with torch.no_grad():  # of all rows where labels are drawn; BatchNorm without statistics takes no single one
        seen = x if labels == "sampled" else x[:2]
        logits = torch.cat([net(part) for part in seen.tensor_split([*cuts(len(seen), chunk)])])
    if labels in ("exact", "weighted") and logits.ndim != 2:
        raise ValueError(f'labels: "{labels}" is for logits (N, C), not {(len(x), *logits.shape[1:])}; use "sampled"')
    space = torch.ones((), dtype=torch.bool, device=x.device) if space is None else space
    space = space.expand(len(x), *logits.shape[1:])
    if labels == "sampled":
        p = logits.masked_fill(~space, float("-inf")).softmax(-1)
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
        y = drawn if y is None else torch.where(y == IGNORED, y, drawn)
    classes = torch.arange(logits.shape[-1], device=x.device)
    choices = [c.expand(len(x)) for c in classes] if y is None or labels == "exact" else [y]

    def surprise(logits: Tensor, rows: slice, choice: int) -> Tensor:
        label = choices[choice][rows]
        log_p = logits.masked_fill(~space[rows], float("-inf")).log_softmax(-1)
        hit = log_p.gather(-1, label.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        scale = (hit.detach() / 2).exp() if labels in ("exact", "weighted") else 1  # its square is the probability
        return -(scale * torch.where(label == IGNORED, 0, hit)).sum()

    return _mean_slopes(net, surprise, torch.square, x, chunk, len(choices))


@checks.arguments
def sensitivity(model: nn.Module, x: Tensor, *, chunk: checks.Count | None = None) -> dict[str, Tensor]:
    """How much the squared length of the outputs reacts to each parameter.

    The mean over examples of |d ||f(x)||^2 / d theta_i|: the importance of Memory Aware Synapses (Aljundi et al. 2018,
    arXiv 1711.09601, eq. 4), which needs no labels. The inputs `x` (N, ...) are prepared; `chunk` is as in `fisher`.
    """
    net, chunk = _ready(model, x, chunk)
    return _mean_slopes(net, lambda logits, *_: logits.square().sum(), torch.abs, x, chunk)


@checks.arguments
@torch.no_grad()
def grams(model: nn.Module, weights: Weights, x: Tensor, *, chunk: checks.Count = 64) -> dict[str, Tensor]:
    """The Gram matrices X^T X of the inputs of linear layers and convolutions, by the name of the layer's weight.

    For every `nn.Linear` that is called, X has a row for each input vector (in); for every ungrouped `nn.Conv2d` one
    for each place of the kernel (in x height x width, as a kernel is flattened, padding included). Sums over all rows,
    not means: what RegMean needs (arXiv 2212.09849). The model runs with `weights`, in evaluation mode, once over the
    prepared inputs `x`, `chunk` examples at a time. Layers that share a weight, and layers that are called several
    times, add up. Products and sums are in float32, or float64 for weights in float64: 2.5 GB for a layer of 25,088
    inputs. The model itself is left alone. Raises ValueError for weights that are not the model's, for no rows, and
    where that memory is not free.
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
    size = 4 * sum(layer.weight[0].numel() ** 2 for layer, _ in hooks)
    checks.room("model: the Gram matrices of its layers", size, x.device, "take another merge, or a smaller network")
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
        x = patches(x[None], layer.kernel_size, layer.stride, 0, layer.dilation)[0].T
    return x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))


def patches(x: Tensor, kernel: Sequence[int], stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Tensor:
    """What a kernel meets at each of its places: (N, M, C, *sizes) to (N, C x kernel, M x places).

    The arguments are those of torch's convolutions in any number of dimensions; padding is with zeros.
    """
    axes, same = len(kernel), padding == "same"
    ends = 0 if isinstance(padding, str) else padding
    steps, gaps, ends = (torch.tensor(v).expand(axes).tolist() for v in (stride, dilation, ends))
    spans = [gap * (width - 1) + 1 for gap, width in zip(gaps, kernel, strict=True)]
    pads = [((span - 1) // 2, span // 2) if same else (end, end) for span, end in zip(spans, ends, strict=True)]
    x = F.pad(x, [p for pair in reversed(pads) for p in pair]) if axes else x
    for axis in range(axes):
        x = x.unfold(3 + axis, spans[axis], steps[axis])[..., :: gaps[axis]]
    x = x.permute(0, 2, *range(3 + axes, 3 + 2 * axes), 1, *range(3, 3 + axes))
    return x.flatten(2 + axes).flatten(1, 1 + axes)


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
    with torch.inference_mode(False):
        net = copy.deepcopy(unwrapped(model))
    net.eval()
    return net


Slopes = dict[str, Tensor]  # of parameters, by name
Objective = Callable[[Tensor, slice, int], Tensor]  # logits, their rows and a choice: a sum over rows, each alone
Size = Callable[[Tensor], Tensor]


def _mean_slopes(net: nn.Module, objective: Objective, size: Size, x: Tensor, chunk: int, choices: int = 1) -> Slopes:
    """The mean over rows of `size` of the objective's gradient in each row alone, summed over the choices."""
    # the attention that can be batched over examples; what torch batches by a loop of its own is no news
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(), torch.inference_mode(False):
        warnings.filterwarnings("ignore", "There is a performance drop")
        x = x.clone() if x.is_inference() else x
        try:
            total = _by_layer(net, objective, size, x, chunk, choices)
        except (RuntimeError, ValueError):  # what vmap cannot do: recurrent cells, branches on values, dropout, hooks
            total = _one_by_one(net, objective, size, x, choices)
    return {name: t / len(x) for name, t in total.items()}


def _one_by_one(net: nn.Module, objective: Objective, size: Size, x: Tensor, choices: int) -> Slopes:
    """The sum over rows and choices of `size` of the gradient, in one pass each."""
    live = trainable(net)
    total = {name: torch.zeros_like(p) for name, p in live.items()}
    try:
        for row, choice in itertools.product(range(len(x)), range(choices)):
            rows = slice(row, row + 1)
            value = objective(net(x[rows]), rows, choice)
            slopes = torch.autograd.grad(value, list(live.values()), materialize_grads=True)
            for name, slope in zip(live, slopes, strict=True):
                total[name] += size(slope)
    except (RuntimeError, ValueError) as error:
        bare = [n for n, m in net.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
        norms = f"; BatchNorm without statistics, here {bare[0]!r}, takes no single row" if bare else ""
        raise ValueError(
            f"model: {type(net).__name__} has no gradients for one example alone ({error}){norms}; let it take "
            "single rows, or use a rule that does without"
        ) from error
    return total


# a linear layer or a convolution as it was called, by torch's names for its arguments, and the shape that came out
Product = namedtuple("Product", "shape input weight bias stride padding dilation groups", defaults=(None, 1, 0, 1, 1))


class _Tapped(TorchFunctionMode):
    """Keeps the products with known weights, and adds to some a tap: a zero, whose gradient is the product's own."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.names = {id(weight): name for name, weight in weights.items()}
        self.taps: Slopes = {}
        self.products: defaultdict[str, list[Product]] = defaultdict(list)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (F.linear, F.conv1d, F.conv2d, F.conv3d):
            product = Product(out.shape, *args, **kwargs)
            name = self.names.get(id(product.weight), "")
            self.products[name].append(product)
            out = out + self.taps.get(name, 0)
        return out


def _by_layer(net: nn.Module, objective: Objective, size: Size, x: Tensor, chunk: int, choices: int) -> Slopes:
    """The same, from what goes into linear layers and convolutions and from the gradients at what comes out.

    These give a weight's whole gradient if its layer is called once, autograd's graph takes the weight in once, and a
    zero added to the layer's output has a gradient: the weight has no other way. Of any other parameter each example
    gets one of its own, whose gradient is formed. Each row passes the network alone, by vmap. Raises RuntimeError where
    that cannot be, or gives the first row other gradients than autograd alone: hooks, say, are lost in vmap.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in trainable(net).items()}
    tapped, whole = _Tapped(leaves), {}

    def forward(row: Tensor, given: Slopes) -> tuple[Tensor, Slopes]:
        own = {name: t for name, t in given.items() if name not in whole}
        tapped.taps, tapped.products = given, defaultdict(list)
        with tapped:
            out = called(net, {**leaves, **own}, (row.unsqueeze(0),))
        # [once] raises ValueError where the layer is not called once
        return out.squeeze(0), {name: once.input.detach() for name in whole for [once] in [tapped.products[name]]}

    def add_up(x: Tensor, objective: Objective, size: Size, choices: int) -> Slopes:
        total = {name: torch.zeros_like(p) for name, p in leaves.items()}
        for start in range(0, len(x), chunk):
            rows = slice(start, min(start + chunk, len(x)))
            given = {name: t.expand(rows.stop - start, *t.shape).requires_grad_() for name, t in parts.items()}
            out, inputs = torch.func.vmap(forward)(x[rows], given)
            uses = _uses(out)
            if any(uses[id(leaves[name])] != 1 for name in whole):
                raise RuntimeError("the network is another at every call")
            for choice in range(choices):
                slopes = torch.autograd.grad(objective(out, rows, choice), [*given.values()], retain_graph=choices > 1)
                for name, slope in zip(given, slopes, strict=True):
                    total[name] += _sum(whole[name], inputs[name], slope, size) if name in whole else size(slope).sum(0)
        return total

    out, _ = torch.func.vmap(forward)(x[:1], {})
    uses = _uses(out)
    whole |= {n: calls[0] for n, leaf in leaves.items() if len(calls := tapped.products[n]) == uses[id(leaf)] == 1}
    parts = {name: leaf.detach() for name, leaf in leaves.items() if uses[id(leaf)]}
    parts |= {name: product.weight.new_zeros(product.shape) for name, product in whole.items()}
    # outputs in a random direction: an objective's own gradient may vanish, as where a label is left out
    direction = torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(0)).to(out)
    found = add_up(x[:1], lambda logits, *_: (logits * direction).sum(), torch.positive, 1)
    plain = torch.autograd.grad((net(x[:1]) * direction).sum(), [*trainable(net).values()], materialize_grads=True)
    gaps = torch.stack([(slope - t).norm() for slope, t in zip(plain, found.values(), strict=True)])
    sizes = torch.stack([slope.norm() for slope in plain])
    eps = max(torch.finfo(slope.dtype).eps for slope in plain)
    # by a part of the parameter's own size, or of the largest where its own is but rounding
    if not (gaps <= eps**0.25 * sizes + 16 * eps * sizes.max()).all():
        raise RuntimeError("gradients by layer are not the network's own")
    return add_up(x, objective, size, choices)


def _uses(value: Tensor) -> Counter[int]:
    """How often the graph of a value takes in each leaf, by its id; one that two take in by one view counts twice."""
    uses, seen, nodes = Counter[int](), set[Any]({None}), [value.grad_fn]
    while nodes:
        node = nodes.pop()
        while len(sources := getattr(node, "next_functions", ())) == 1:
            if getattr(node, "_saved_padding_idx", 0) < getattr(node, "_saved_weight_sym_argsize_0", 0):
                raise RuntimeError("torch's vmap forgets the padding index of an embedding")
            node = sources[0][0]
        uses[id(getattr(node, "variable", None))] += 1
        nodes += [source for source, _ in sources if node not in seen]
        seen.add(node)
    return uses


def _sum(product: Product, x: Tensor, g: Tensor, size: Size) -> Tensor:
    """The sum over examples of `size` of the weight's gradient.

    It comes from a product's inputs (N, ..., C, *sizes) and the gradients at its outputs (N, ..., O, *places).
    """
    weight, groups = product.weight, product.groups
    x, g = (t.reshape(len(t), -1, *t.shape[1 - weight.ndim :]) for t in (x, g))
    g = g.movedim(1, 2).flatten(2)
    one = x.shape[1] == g.shape[2] == 1  # whose gradient is a product of two: so is its size
    rows = max(1, NUMBERS_IN_A_PIECE // (groups * weight[0].numel() * g.shape[2] + (not one) * weight.numel()))
    total = torch.zeros_like(weight).view(groups, len(weight) // groups, -1)
    for pair in zip(x.split(rows), g.split(rows), strict=True):
        into = patches(pair[0], weight.shape[2:], product.stride, product.padding, product.dilation)
        a, b = (t.unflatten(1, (groups, -1)) for t in (into.conj(), pair[1]))
        total += torch.einsum("ngop,ngip->goi", size(b), size(a)) if one else size(b @ a.mT).sum(0)
    return total.view_as(weight)

"""Merges that are weighted means: one weight for each network, tensor, entry (Fisher) or input of a layer (RegMean)."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from clkit import weights
from clkit.checks import NotNegative, Positive, Share
from clkit.merging.pieces import Piece, Scale, TaskVectors, check_inputs, on_parameters
from clkit.weights import Weights, check_finite, combine, is_statistic, wide

ANTIPODAL = math.pi - 1e-3  # beyond this angle there is no one great circle through two points


@on_parameters(statistics=True)
def average(ws: Sequence[Weights], *, coefficients: Sequence[NotNegative] | None = None) -> dict[str, Tensor]:
    """The mean of weights; with `coefficients`, one for each and none negative, the mean weighted by them.

    Coefficients are divided by their sum, so that counts of examples or of tasks can be given. Raises ValueError for
    other coefficients.

    Ref: model soups, Wortsman et al., arXiv 2203.05482.
    """
    given = [1.0] * len(ws) if coefficients is None else coefficients
    _check_one_each("coefficients", given, ws)
    total = math.fsum(given)
    if not 0 < total < math.inf:
        raise ValueError(f"coefficients: {given} add up to {total:g}; give some with a positive sum")
    return combine(ws, [c / total for c in given])


@on_parameters(statistics=True)
def greedy_soup(ws: Sequence[Weights], *, score: Callable[[Weights], float]) -> dict[str, Tensor]:
    """The mean of those weights that, taken in from the best to the worst, never lower the score of the mean.

    `score` gives a number for weights (names and shapes of the inputs), higher is better: accuracy on held-out data,
    say, but never on the data that results are reported on. Weights that score alike are taken in their order. Each one
    is judged once alone and, but for the best, once in the soup. Those that leave the score as it is are taken, as in
    the paper. Raises ValueError for a score that is not finite.

    Ref: Wortsman et al., Model soups, arXiv 2203.05482, recipe 1.
    """
    check_inputs(ws)

    def mean(places: Sequence[int]) -> dict[str, Tensor]:
        into = weights.map_weights(torch.empty_like, ws[0])  # of the first one's dtype, whichever is best
        return combine([ws[i] for i in places], [1 / len(places)] * len(places), out=into)

    alone = [float(score(w)) for w in ws]
    if not all(math.isfinite(s) for s in alone):
        raise ValueError(f"score: it gave {alone}; give a function of weights to finite numbers, higher is better")
    first, *others = sorted(range(len(ws)), key=lambda i: -alone[i])
    taken, best, soup = [first], alone[first], mean([first])
    for i in others:
        mixed = mean([*taken, i])
        if (found := float(score(mixed))) >= best:
            taken, best, soup = [*taken, i], found, mixed
    return soup


@on_parameters(number=2, statistics=True)
def interpolate(ws: Sequence[Weights], *, t: Share = 0.5) -> dict[str, Tensor]:
    """The point on the straight line from the first of two weights (t = 0, bitwise) to the second (t = 1, bitwise)."""
    return weights.lerp(ws[0], ws[1], t)


@on_parameters(number=1, statistics=True)
def wise_ft(ws: Sequence[Weights], *, base: Weights, alpha: Share = 0.5) -> dict[str, Tensor]:
    """The point on the straight line from `base` (alpha = 0, bitwise) to fine-tuned weights (alpha = 1, bitwise).

    (1 - alpha) base + alpha w: alpha weights the fine-tuned ones. The paper finds 0.5 good without tuning.

    Ref: Wortsman et al., Robust fine-tuning of zero-shot models, arXiv 2109.01903.
    """
    return weights.lerp(base, ws[0], alpha)


@on_parameters(number=2, statistics=True)
def slerp(ws: Sequence[Weights], *, t: Share = 0.5, whole: bool = False) -> dict[str, Tensor]:
    """The point on the arc from the first of two weights (t = 0, bitwise) to the second (t = 1, bitwise).

    (sin((1-t) w) a + sin(t w) b) / sin w with the angle w between a and b: the directions turn at even speed and
    lengths do not shrink in between, as they do on a straight line. The angle is measured tensor by tensor;
    `whole=True` takes one angle, that of all parameters as one vector, in which large tensors decide. Parallel and zero
    tensors are interpolated linearly, which is the limit; so are opposite ones (within 0.001 of pi), where the arc is
    not defined. Running statistics have no direction and are interpolated linearly, too.

    Ref: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985. For weights it is folklore; mergekit works
    tensor by tensor, too.
    """
    a, b = ws
    merged = weights.lerp(weights.statistics(a), weights.statistics(b), t)
    turned = [name for name in a if name not in merged]
    for names in [turned] if whole and turned else [[name] for name in turned]:
        from_a, from_b = _arc(_angle(a, b, names), t)
        for name in names:
            dtype = wide(a[name], b[name])
            merged[name] = (a[name] * from_a.to(dtype)).addcmul_(b[name].to(dtype), from_b.to(dtype))
    return merged


@on_parameters()
def task_arithmetic(ws: Sequence[Weights], *, base: Weights, scale: Scale | None = None) -> dict[str, Tensor]:
    """`base` plus `scale` times the sum of the task vectors w - base: base + scale sum_i (w_i - base).

    The paper tunes one scale for all task vectors on held-out data, in steps of 0.05, and finds about 0.3 for eight.
    None stands for 1 / n, the mean of the task vectors, at which copies merge to the copy.

    Ref: Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089.
    """
    factor = 1 / len(ws) if scale is None else scale
    return combine([base, *ws], [1 - factor * len(ws), *[factor] * len(ws)])


@on_parameters()
def model_stock(ws: Sequence[Weights], *, base: Weights, whole: bool = False) -> dict[str, Tensor]:
    """The point between `base` and the mean of the weights that the angle between the task vectors calls for.

    It is r mean(w) + (1 - r) base with r = n c / (1 + (n - 1) c). Here c is the mean cosine between two of the n task
    vectors (n, entries). r is 1 for parallel ones, as of copies, and 0 for orthogonal ones, where all but the base is
    noise. Measured tensor by tensor, as in the paper, or over all weights. A negative mean cosine counts as 0 (the
    ratio would be negative), and so does one with a zero task vector. One network, which has no angle, is returned.

    Ref: Jang et al., Model stock: all we need is just a few fine-tuned models, arXiv 2403.19522, eq. 2 and 6.
    """
    vectors, ratios = TaskVectors(ws, base), {}
    for names in vectors.groups(whole):
        gram = torch.zeros(len(ws), len(ws), dtype=torch.float64)
        for part in map(vectors.read, vectors.pieces(names)):
            gram += (part @ part.T).double().cpu()
        ratios |= dict.fromkeys(names, stock_ratio(gram))
    return vectors.merge(lambda piece, part: part.mean(0) * ratios[piece.name])


def stock_ratio(gram: Tensor) -> float:
    """The share of the mean in `model_stock`, from the inner products (n, n) of n task vectors."""
    n = len(gram)
    if n == 1:
        return 1.0
    lengths = gram.diagonal().clamp(min=0).sqrt()
    products = torch.outer(lengths, lengths)
    cosines = torch.where(products > 0, gram / products, 0)
    cosine = float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
    cosine = min(max(cosine, 0.0), 1.0)
    return n * cosine / (1 + (n - 1) * cosine)


@on_parameters()
def fisher_merge(
    ws: Sequence[Weights], *, importances: Sequence[Weights], coefficients: Sequence[Positive] | None = None
) -> dict[str, Tensor]:
    """The mean of weights, at every entry weighted by the importances there: sum_i F_i w_i / sum_i F_i.

    `importances`: for each of the weights a mapping of names to non-negative tensors of their shapes, in any common
    unit, as `curvature.fisher` gives them. Names without one are averaged, and so are entries where no network has any
    importance; those of running statistics do not count. `coefficients` multiply the importances of each. The paper
    takes the diagonal Fisher information and tunes the coefficients. Its code divides them by the length of each
    network's importances. It puts 1e-6 in the place of smaller importances, by default in the first network alone.

    With the previous and the current weights this is CoFiMA (Marouf et al., arXiv 2312.08977), a step of a sequence.

    Raises ValueError for importances that `check_importances` refuses, and for coefficients that are not above 0.

    Ref: Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv 2111.09832.
    """
    vectors = TaskVectors(ws, ws[0] if ws else {})
    given = [1.0] * len(ws) if coefficients is None else coefficients
    _check_one_each("coefficients", given, ws)
    _check_one_each("importances", importances, ws)
    importances = [{name: t for name, t in known.items() if not is_statistic(name)} for known in importances]
    for i, known in enumerate(importances):
        check_importances(f"importances[{i}]", known, ws[0])
    flat = [{name: tensor.detach().reshape(-1) for name, tensor in known.items()} for known in importances]
    factors = torch.tensor(given, dtype=vectors.dtype)[:, None]

    def rule(piece: Piece, part: Tensor) -> Tensor:
        f = torch.zeros_like(part)
        for row, known in zip(f, flat, strict=True):
            if piece.name in known:
                row.copy_(piece.of(known))
        f.mul_(factors.to(f.device))
        most = f.amax(0)
        f.div_(torch.where(most > 0, most, 1)).masked_fill_(most == 0, 1)
        return part.mul_(f).sum(0).div_(f.sum(0))

    return vectors.merge(rule)


def check_importances(name: str, known: Weights, like: Weights) -> None:
    """Raises ValueError unless importances are finite, at least 0, and of the names and shapes of the weights `like`.

    Weights without an importance are allowed.
    """
    _check_known(name, known, {key: tensor.shape for key, tensor in like.items()})
    for key, tensor in known.items():
        if (tensor < 0).any():
            raise ValueError(f"{name}: {key!r} has negative entries; give squares or magnitudes")


@on_parameters()
def regmean(ws: Sequence[Weights], *, grams: Sequence[Weights], shrink: Share = 0.9) -> dict[str, Tensor]:
    """Linear layers whose outputs come closest, in least squares, to each network's own on its own inputs.

    W = (sum_i G_i)^-1 sum_i G_i W_i for W (in, out), with the Gram matrices G_i = X_i^T X_i of the layers' inputs.
    Their off-diagonal entries are multiplied by `shrink`: the paper's 0.9, or 0.1 on some language models; 1 is the
    exact least squares. `grams`: for each network a mapping of a parameter's name, as in "linear.weight", to a matrix
    (in, in), as `curvature.grams` gives it; a kernel of a convolution counts as (out, in x height x width). Networks
    count by their number of rows. Parameters without a Gram matrix in every network are averaged, and so are inputs
    that were always zero: where the solution is not unique, it is the one nearest to the mean. Memory is, in double
    precision, that of all Gram matrices of one layer at a time.

    Raises ValueError for matrices of other shapes.

    Ref: Jin et al., Dataless knowledge fusion by merging weights, arXiv 2212.09849.
    """
    vectors = TaskVectors(ws, ws[0] if ws else {})
    matrices = {name: tensor.flatten(1) for name, tensor in ws[0].items() if tensor.ndim > 1}
    _check_one_each("grams", grams, ws)
    for i, known in enumerate(grams):
        _check_known(f"grams[{i}]", known, {key: (m.shape[1], m.shape[1]) for key, m in matrices.items()})
    merged = vectors.merge(lambda piece, part: part.mean(0))
    for name, mean in merged.items():
        if all(name in known for known in grams):
            matrix = torch.stack([w[name].flatten(1).double() for w in ws])
            moved = _regression([known[name].to(matrix) for known in grams], matrix - matrix.mean(0), shrink)
            mean.copy_((matrix.mean(0) + moved).view_as(mean))
    return merged


def _regression(grams: Sequence[Tensor], matrices: Tensor, shrink: float) -> Tensor:
    """The smallest D (out, in) with D sum_i G_i = sum_i W_i G_i, for G shrunk; in double precision."""
    total, wanted = torch.zeros_like(grams[0]), torch.zeros_like(matrices[0])
    for gram, matrix in zip(grams, matrices, strict=True):
        shrunk = gram * shrink + torch.diag(gram.diagonal()) * (1 - shrink)
        total, wanted = total + shrunk, wanted + matrix @ shrunk
    size = total.diagonal().clamp(min=0).sqrt()
    unit = torch.where(size > 0, 1 / size, 0)
    solved = torch.linalg.pinv(unit[:, None] * total * unit, hermitian=True, rtol=len(total) * 1e-12)
    return (wanted * unit) @ solved * unit


def _check_one_each(name: str, given: Sequence[object], ws: Sequence[Weights]) -> None:
    """Raises ValueError unless one thing is given for each of the weights."""
    if len(given) != len(ws):
        raise ValueError(f"{name}: {len(given)} for {len(ws)} weights; give one for each")


def _check_known(name: str, known: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless what is known of weights is finite, and of the shape that goes with its name."""
    check_finite(known, name)
    for key, tensor in known.items():
        if tensor.shape != shapes.get(key):
            shape, remedy = tuple(tensor.shape), "measure it on the same architecture, by curvature.fisher or .grams"
            raise ValueError(f"{name}: {key!r} of shape {shape} does not fit the weights; {remedy}")


def _angle(a: Weights, b: Weights, names: Sequence[str]) -> Tensor:
    """The angle between some tensors of two weights, as vectors; 0 if one of them is zero."""
    products = []
    for name in names:
        x, y = (tensor.flatten().to(wide(a[name], b[name])) for tensor in (a[name], b[name]))
        products.append(torch.stack([torch.dot(x, x), torch.dot(y, y), torch.dot(x, y)]))
    xx, yy, xy = torch.stack(products).sum(0)
    lengths = (xx * yy).sqrt()
    return torch.where(lengths > 0, xy / lengths, 1.0).clamp(-1, 1).acos()


def _arc(angle: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Factors of the two ends on the arc, without a host synchronisation; sinc holds at angle 0, too."""
    curved = angle < ANTIPODAL
    whole = torch.sinc(angle / math.pi)

    def factor(share: float) -> Tensor:
        return torch.where(curved, share * torch.sinc(share * angle / math.pi) / whole, share)

    return factor(1 - t), factor(t)

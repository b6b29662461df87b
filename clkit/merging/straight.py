"""Merges on straight lines and arcs: sums of weights with one coefficient for each, or for each tensor."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clkit import weights
from clkit.merging.pieces import TaskVectors, check_inputs
from clkit.merging.vectors import finite
from clkit.weights import Weights, check_same, combine

ANTIPODAL = math.pi - 1e-3  # beyond this angle there is no one great circle through two points


def average(
    ws: Sequence[Weights], *, coefficients: Sequence[float] | None = None, out: Weights | None = None
) -> dict[str, Tensor]:
    """The mean of weights; with `coefficients`, one for each and none negative, the mean weighted by them.

    Coefficients are divided by their sum, so that counts of examples or of tasks can be given. With `out`, weights of
    the same names and shapes, the result is written there.

    Ref: model soups, Wortsman et al., arXiv 2203.05482.
    """
    given = [1.0] * len(ws) if coefficients is None else list(coefficients)
    total = math.fsum(given)
    if len(given) != len(ws) or not ws or min(given) < 0 or not 0 < total < math.inf:
        raise ValueError(
            f"coefficients: {given} for {len(ws)} weights; give one for each, none negative, with a positive sum"
        )
    return _sound(combine(ws, [c / total for c in given], out=out), ws)


def greedy_soup(ws: Sequence[Weights], *, score: Callable[[Weights], float]) -> dict[str, Tensor]:
    """The mean of those weights that, taken in from the best to the worst, never lower the score of the mean.

    `score` gives a number for weights, higher is better, as accuracy on held-out data, which must not be the data that
    results are reported on. Weights that score alike are taken in their order. Each one is judged once alone and, but
    for the best, once in the soup; those that leave the score as it is are taken, as in the paper.

    Ref: Wortsman et al., Model soups, arXiv 2203.05482, recipe 1.
    """
    if not ws:
        raise ValueError("ws: no weights were given; give at least one")
    check_same(*ws)
    check_inputs(ws)
    alone = [float(score(w)) for w in ws]
    if not all(math.isfinite(s) for s in alone):
        raise ValueError(f"score: it gave {alone}; give a function of weights to finite numbers, higher is better")
    first, *others = sorted(range(len(ws)), key=lambda i: -alone[i])
    taken, best, soup = [first], alone[first], average([ws[first]])
    for i in others:
        mixed = average([ws[j] for j in [*taken, i]])
        if (found := float(score(mixed))) >= best:
            taken, best, soup = [*taken, i], found, mixed
    return soup


def interpolate(ws: Sequence[Weights], *, t: float = 0.5) -> dict[str, Tensor]:
    """The point on the straight line from the first of two weights (t = 0, bitwise) to the second (t = 1, bitwise)."""
    a, b = _pair(ws, t)
    return _sound(weights.lerp(a, b, t), ws)


def wise_ft(ws: Sequence[Weights], *, base: Weights, alpha: float = 0.5) -> dict[str, Tensor]:
    """The point on the straight line from `base` (alpha = 0, bitwise) to fine-tuned weights (alpha = 1, bitwise).

    (1 - alpha) base + alpha w: alpha weights the fine-tuned ones. The paper finds 0.5 good without tuning.

    Ref: Wortsman et al., Robust fine-tuning of zero-shot models, arXiv 2109.01903.
    """
    if len(ws) != 1:
        raise ValueError(f"ws: {len(ws)} weights were given; this merge takes one beside the base")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha} is outside [0, 1]; 0 is the base, 1 the fine-tuned weights")
    return _sound(weights.lerp(base, ws[0], alpha), ws, base)


def slerp(ws: Sequence[Weights], *, t: float = 0.5, whole: bool = False) -> dict[str, Tensor]:
    """The point on the arc from the first of two weights (t = 0, bitwise) to the second (t = 1, bitwise).

    (sin((1-t) w) a + sin(t w) b) / sin w with the angle w between a and b: the directions turn at even speed and
    lengths do not shrink in between, as they do on a straight line. The angle is measured tensor by tensor;
    `whole=True` takes one angle, that of all weights as one vector, in which large tensors, BatchNorm statistics among
    them, decide. Parallel and zero tensors are interpolated linearly, which is the limit; so are opposite ones
    (within 0.001 of pi), where the arc is not defined.

    Ref: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985. For weights it is folklore; mergekit works
    tensor by tensor, too.
    """
    a, b = _pair(ws, t)
    check_same(a, b)
    angle = _angle(list(a.values()), [b[name] for name in a]) if whole and a else None
    merged = {}
    for name, x in a.items():
        y = b[name]
        from_a, from_b = _arc(_angle([x], [y]) if angle is None else angle, t)
        merged[name] = (x * from_a.to(x.dtype)).addcmul_(y, from_b.to(x.dtype))
    return _sound(merged, ws)


def task_arithmetic(
    ws: Sequence[Weights], *, base: Weights, scale: float | None = None, out: Weights | None = None
) -> dict[str, Tensor]:
    """`base` plus `scale` times the sum of the task vectors w - base: base + scale sum_i (w_i - base).

    The paper tunes one scale for all task vectors on held-out data, in steps of 0.05, and finds about 0.3 for eight.
    None stands for 1 / n, the mean of the task vectors, at which copies merge to the copy. `out` is as in `average`.

    Ref: Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089.
    """
    if not ws:
        raise ValueError("ws: no weights were given; give at least one")
    factor = finite("scale", 1 / len(ws) if scale is None else scale)
    merged = combine([base, *ws], [1 - factor * len(ws), *[factor] * len(ws)], out=out)
    return _sound(merged, ws, base)


def model_stock(ws: Sequence[Weights], *, base: Weights, whole: bool = False) -> dict[str, Tensor]:
    """The point between `base` and the mean of the weights that the angle between the task vectors calls for.

    r mean(w) + (1 - r) base with r = n c / (1 + (n - 1) c), where c is the cosine between two task vectors, meaned over
    pairs: r is 1 for parallel ones, as of copies, and 0 for orthogonal ones, where all but the base is noise.
    Measured tensor by tensor, as in the paper, or over all weights. A negative mean cosine counts as 0 (the ratio would
    be negative), and so does one with a zero task vector; of one network there is no angle, and it is returned.

    Ref: Jang et al., Model stock: all we need is just a few fine-tuned models, arXiv 2403.19522, eq. 2 and 6.
    """
    vectors = TaskVectors(ws, base)
    grams = {name: torch.zeros(len(ws), len(ws), dtype=torch.float64) for name in vectors.names}
    for piece, part in vectors:
        grams[piece.name] += (part @ part.T).double().cpu()
    if whole:
        grams = dict.fromkeys(grams, sum(grams.values(), torch.zeros(len(ws), len(ws), dtype=torch.float64)))
    ratios = {name: stock_ratio(gram) for name, gram in grams.items()}
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


def _sound(merged: dict[str, Tensor], ws: Sequence[Weights], base: Weights | None = None) -> dict[str, Tensor]:
    """The result of a sum, if it is finite: it is not if an input is not, so that one reading of it is enough."""
    sums = {}
    for tensor in merged.values():
        sums[tensor.device] = sums.get(tensor.device, 0) + tensor.sum() * 0
    if not all(bool(s == 0) for s in sums.values()):
        check_inputs(ws, base)
    return merged


def _pair(ws: Sequence[Weights], t: float) -> tuple[Weights, Weights]:
    if len(ws) != 2:
        raise ValueError(f"ws: {len(ws)} weights were given; this merge takes two, use average for more")
    if not 0 <= t <= 1:
        raise ValueError(f"t: {t} is outside [0, 1]; 0 is the first of the weights, 1 the second")
    return ws[0], ws[1]


def _angle(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The angle between two vectors given in parts; 0 if one of them is zero."""
    products = []
    for x, y in zip(xs, ys, strict=True):
        x = x.flatten().to(torch.promote_types(x.dtype, torch.float32))
        y = y.flatten().to(x.dtype)
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

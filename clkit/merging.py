"""Merging: several weights of one architecture into one. Pure functions, and one table of them, `MERGES`.

Every function is called as f(ws, **options), or f(ws, base=base, **options) where task vectors are taken from a base.
All floating tensors count alike, BatchNorm statistics too: re-estimate them afterwards with `normalization.refresh`.
Names and shapes must agree; inputs are not modified; the result is new and has their dtypes and devices. Weights of
different layers do not mix, so a merge reads every input once or twice and writes one output.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch import Tensor

from clkit import weights
from clkit.weights import Weights, check_same, combine

ANTIPODAL = math.pi - 1e-3  # beyond this angle there is no one great circle through two points


def average(ws: Sequence[Weights], *, coefficients: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The mean of weights; with `coefficients`, one for each and none negative, the mean weighted by them.

    Coefficients are divided by their sum, so that counts of examples or of tasks can be given.

    Ref: model soups, Wortsman et al., arXiv 2203.05482.
    """
    given = [1.0] * len(ws) if coefficients is None else list(coefficients)
    total = math.fsum(given)
    if len(given) != len(ws) or not ws or min(given) < 0 or not 0 < total < math.inf:
        raise ValueError(
            f"coefficients: {given} for {len(ws)} weights; give one for each, none negative, with a positive sum"
        )
    return combine(ws, [c / total for c in given])


def interpolate(ws: Sequence[Weights], *, t: float = 0.5) -> dict[str, Tensor]:
    """The point on the straight line from the first of two weights (t = 0, bitwise) to the second (t = 1, bitwise)."""
    a, b = _pair(ws, t)
    return weights.lerp(a, b, t)


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
    angle = _angle(list(a.values()), list(b.values())) if whole and a else None
    merged = {}
    for name, x in a.items():
        y = b[name]
        from_a, from_b = _arc(_angle([x], [y]) if angle is None else angle, t)
        merged[name] = (x * from_a.to(x.dtype)).addcmul_(y, from_b.to(x.dtype))
    return merged


def task_arithmetic(ws: Sequence[Weights], *, base: Weights, scale: float | None = None) -> dict[str, Tensor]:
    """`base` plus `scale` times the sum of the task vectors w - base: base + scale sum_i (w_i - base).

    The paper tunes one scale for all task vectors on held-out data, in steps of 0.05, and finds about 0.3 for eight.
    None stands for 1 / n, the mean of the task vectors, at which copies merge to the copy.

    Ref: Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089.
    """
    if not ws:
        raise ValueError("ws: no weights were given; give at least one")
    factor = 1 / len(ws) if scale is None else float(scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale: {scale} is not finite; use 1 / n or tune it on held-out data from 0 to 1")
    return combine([base, *ws], [1 - factor * len(ws), *[factor] * len(ws)])


@dataclass(frozen=True)
class Merge:
    """A row of `MERGES`: a merging function and what is true of it. Calling the row calls the function.

    `base`: it takes task vectors from a base, so base= must be given. `arity`: it merges exactly so many weights.
    `symmetric`: their order does not matter. `shifts`: moving all weights, and the base, moves the result along.
    `defaults`: options that make this member of its family; a caller's options come first.
    """

    function: Callable[..., dict[str, Tensor]]
    paper: str
    base: bool = False
    arity: int | None = None
    needs: str | None = None
    symmetric: bool = True
    shifts: bool = True
    defaults: Mapping[str, object] = field(default_factory=dict)

    def __call__(self, ws: Sequence[Weights], *, base: Weights | None = None, **options: object) -> dict[str, Tensor]:
        """Merges `ws`. A base is needed where `self.base` says so, and ignored elsewhere."""
        options = {**self.defaults, **options}
        if not self.base:
            return self.function(ws, **options)
        if base is None:
            raise ValueError(f"base: {self.function.__name__} takes task vectors from a base; give base=weights")
        return self.function(ws, base=base, **options)


MERGES: Mapping[str, Merge] = {
    "average": Merge(average, "arXiv 2203.05482"),
    "interpolate": Merge(interpolate, "arXiv 2109.01903", arity=2, symmetric=False),
    "slerp": Merge(slerp, "SIGGRAPH 1985", arity=2, symmetric=False, shifts=False),
    "task_arithmetic": Merge(task_arithmetic, "arXiv 2212.04089", base=True),
}


def merge(name: str, ws: Sequence[Weights], *, base: Weights | None = None, **options: object) -> dict[str, Tensor]:
    """Merges `ws` by the row of `MERGES` called `name`; a ValueError names the closest rows for an unknown one."""
    if name not in MERGES:
        close = get_close_matches(str(name).lower(), MERGES, n=3, cutoff=0.4) or list(MERGES)
        raise ValueError(f"name: there is no merge {name!r}; did you mean one of {close}?")
    return MERGES[name](ws, base=base, **options)


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

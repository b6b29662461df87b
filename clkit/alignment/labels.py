"""Labels: which points lie on the axes of a tensor, and how they follow it through reshapes, sums and products.

A dimension of a tensor is a sequence of *factors* (outer to inner, their sizes multiply). A *part* is an array of
points over some factors: permuting the points permutes these factors jointly. A factor in no part is fixed if it has
a reason (`why`), else uniform: the tensor does not vary along it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from clkit.alignment.points import Ids, Points


@dataclass(frozen=True, eq=False)
class Factor:
    """A piece of a dimension; `why` it is fixed ("" if it is uniform or in a part)."""

    size: int
    why: str = ""


@dataclass(frozen=True, eq=False)
class Part:
    """Points over some factors: axis k of `points` is `factors[k]`."""

    points: Ids
    factors: tuple[Factor, ...]

    def ordered(self, factors: Sequence[Factor]) -> Ids:
        """The points with their axes in the order of `factors`."""
        return self.points.transpose([self.factors.index(f) for f in factors])


@dataclass(frozen=True, eq=False)
class Label:
    """Factors for every dimension of a tensor and the parts over them."""

    dims: tuple[tuple[Factor, ...], ...]
    parts: tuple[Part, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the dimensions."""
        return tuple(prod(f.size for f in dim) for dim in self.dims)

    @property
    def uniform(self) -> bool:
        """Is there an axis that the tensor does not vary along?"""
        return any(not f.why and self.part(f) is None for row in self.dims for f in row)

    def part(self, factor: Factor) -> Part | None:
        """The part that holds a factor, if one does."""
        return next((p for p in self.parts if factor in p.factors), None)

    def touching(self, dims: Iterable[int]) -> list[Part]:
        """The parts with a factor in one of the dimensions."""
        inside = {f for d in dims for f in self.dims[d]}
        return [p for p in self.parts if not inside.isdisjoint(p.factors)]


def fixed(shape: Sequence[int], why: str) -> Label:
    """A label whose every axis is fixed."""
    return Label(tuple((Factor(n, why),) if n > 1 else () for n in shape))


def tidy(dims: Sequence[Sequence[Factor]], parts: Iterable[Part]) -> Label:
    """A label without factors of size 1 and with neighbours in one dimension merged where they are one axis."""
    kept = []
    for part in parts:
        factors = tuple(f for f in part.factors if f.size > 1)
        if factors:
            kept.append(Part(part.points.reshape([f.size for f in factors]), factors))
    out = []
    for dim in dims:
        row: list[Factor] = []
        for factor in dim:
            if factor.size == 1:
                continue
            row.append(factor)
            if len(row) > 1 and (merged := _merge(row[-2], factor, kept)):
                row[-2:] = [merged]
        out.append(tuple(row))
    return Label(tuple(out), tuple(kept))


def _merge(outer: Factor, inner: Factor, parts: list[Part]) -> Factor | None:
    both = Factor(outer.size * inner.size, outer.why or inner.why)
    for i, part in enumerate(parts):
        if outer in part.factors or inner in part.factors:
            k = part.factors.index(outer) if outer in part.factors else len(part.factors)
            if part.factors[k + 1 : k + 2] != (inner,):
                return None
            shape = part.points.shape
            points = part.points.reshape(*shape[:k], both.size, *shape[k + 2 :])
            parts[i] = Part(points, (*part.factors[:k], both, *part.factors[k + 2 :]))
            return both
    return both if bool(outer.why) == bool(inner.why) else None


def cut(label: Label, cuts: dict[Factor, tuple[int, ...]]) -> Label:
    """Splits factors into several, outer to inner."""
    new = {f: tuple(Factor(n, f.why) for n in sizes) for f, sizes in cuts.items()}
    dims = tuple(tuple(g for f in dim for g in new.get(f, (f,))) for dim in label.dims)
    parts = []
    for part in label.parts:
        factors = tuple(g for f in part.factors for g in new.get(f, (f,)))
        parts.append(Part(part.points.reshape([f.size for f in factors]), factors))
    return Label(dims, tuple(parts))


def drop(points: Points, label: Label, parts: Iterable[Part], why: str) -> Label:
    """Pins some parts of a label and makes their factors fixed ones."""
    gone = {f: Factor(f.size, why) for part in parts for f in part.factors}
    for part in parts:
        points.pin(part.points, why)
    dims = [[gone.get(f, f) for f in dim] for dim in label.dims]
    return tidy(dims, [p for p in label.parts if p.factors[0] not in gone])


def reshape(points: Points, label: Label, shape: Sequence[int], why: str) -> Label:
    """The same elements, in row-major order, in another shape; pins everything if an axis is cut unevenly."""
    line = tidy([[f for dim in label.dims for f in dim]], label.parts)
    rest = [(f, f.size) for f in line.dims[0]]
    pieces: dict[Factor, list[int]] = {f: [] for f in line.dims[0]}
    lengths = []
    for n in shape:
        lengths.append(0)
        while n > 1:
            factor, left = rest.pop(0) if rest else (None, 0)
            take = left if left and n % left == 0 else n
            if factor is None or left % take:
                drop(points, label, label.parts, why)
                return fixed(shape, why)
            pieces[factor].append(take)
            lengths[-1] += 1
            n //= take
            if left > take:
                rest.insert(0, (factor, left // take))
    line = cut(line, {f: tuple(sizes) for f, sizes in pieces.items()})
    queue = iter(line.dims[0])
    return tidy([[next(queue) for _ in range(length)] for length in lengths], line.parts)


def permute(label: Label, order: Sequence[int]) -> Label:
    """The dimensions in another order."""
    return Label(tuple(label.dims[d] for d in order), label.parts)


def whole(points: Points, label: Label, dim: int, why: str) -> Label:
    """The label with one factor at most in a dimension: a flattened axis becomes points of its own."""
    if len(label.dims[dim]) < 2:
        return label
    parts = label.touching([dim])
    inside = [p for p in parts if set(p.factors) <= set(label.dims[dim])]
    label = drop(points, label, [p for p in parts if p not in inside[:1]], why)
    row = label.dims[dim]
    if len(row) < 2:
        return label
    one = Factor(prod(f.size for f in row), next((f.why for f in row if f.why), ""))
    new = []
    for part in label.touching([dim]):
        array = part.ordered([f for f in row if f in part.factors])
        repeats = [k for k, f in enumerate(row) if f not in part.factors]
        if repeats:
            array = np.broadcast_to(np.expand_dims(array, repeats), [f.size for f in row])
            index = tuple(np.indices(array.shape)[repeats])
            array = points.copies(array, np.asarray(np.ravel_multi_index(index, [row[k].size for k in repeats])))
        one = Factor(one.size)
        new.append(Part(array.reshape(-1), (one,)))
    keep = [p for p in label.parts if p not in label.touching([dim])]
    return Label((*label.dims[:dim], (one,), *label.dims[dim + 1 :]), (*keep, *new))


def gather(points: Points, label: Label, dim: int, index: Ids, why: str) -> Label:
    """The entries `index` (known beforehand) along a dimension."""
    label = whole(points, label, dim, why)
    if not label.dims[dim]:
        return label if len(index) == 1 else replace(label, dim, Factor(len(index)))
    (factor,) = label.dims[dim]
    new, part = Factor(len(index), factor.why), label.part(factor)
    if part is None:
        return replace(label, dim, new)
    axis = part.factors.index(factor)
    array = np.ascontiguousarray(part.points.take(index, axis))
    if len(np.unique(index)) < factor.size:
        points.separate(array)
    factors = tuple(new if f is factor else f for f in part.factors)
    return replace(label, dim, new, Part(points.distinct(array), factors), part)


def replace(label: Label, dim: int, factor: Factor, part: Part | None = None, old: Part | None = None) -> Label:
    """The label with another factor as a dimension, and the part that holds it in place of `old`."""
    parts = [p for p in label.parts if p is not old] + ([part] if part else [])
    return tidy([*label.dims[:dim], (factor,), *label.dims[dim + 1 :]], parts)


def expand(label: Label, shape: Sequence[int]) -> Label:
    """The label of a tensor repeated along dimensions of size 1, and along new ones in front."""
    dims = ((),) * (len(shape) - len(label.dims)) + label.dims
    return Label(tuple(row if row or n == 1 else (Factor(n),) for row, n in zip(dims, shape, strict=True)), label.parts)

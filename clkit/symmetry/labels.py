"""Labels: which points lie on the axes of a tensor, and how they follow it through reshapes, sums and products.

A dimension of a tensor is a sequence of *factors* (outer to inner, their sizes multiply). A *part* is an array of
points over some factors: permuting the points permutes these factors jointly. A factor in no part is fixed if it has
a reason (`why`), else uniform: the tensor does not vary along it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np

from clkit.symmetry.points import Ids, Points


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


def reorder(label: Label, order: Sequence[int]) -> Label:
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


def join(points: Points, labels: Sequence[Label], why: str) -> Label:
    """The label of an elementwise operation with broadcasting: ties what meets, pins what meets a fixed axis."""
    labels = aligned(points, labels, why)
    rank = len(labels[0].dims)
    slots = []
    for d in range(rank):
        row = max((label.dims[d] for label in labels), key=lambda r: prod(f.size for f in r))
        slots.append(tuple(Factor(f.size) for f in row))
    parts: list[Part] = []
    reasons: dict[Factor, str] = {}
    for label in labels:
        name = {
            f: slot
            for row, place in zip(label.dims, slots, strict=True)
            if row
            for f, slot in zip(row, place, strict=True)
        }
        new = [Part(p.points, tuple(name[f] for f in p.factors)) for p in label.parts]
        whys = {slot: f.why for f, slot in name.items() if f.why and label.part(f) is None}
        covered = {f for p in parts for f in p.factors}
        new = [q for q in new if not _pinned(points, q, {f: w for f, w in reasons.items() if f not in covered})]
        parts = [p for p in parts if not _pinned(points, p, whys)]
        reasons |= whys
        for p in parts:
            for q in new:
                _tie(points, p, q, why)
        union, parts = sorted([*parts, *new], key=lambda p: -len(p.factors)), []
        for p in union:
            if all(set(p.factors).isdisjoint(other.factors) for other in parts):
                parts.append(p)
        reasons |= {f: why for p in union for f in p.factors if f not in reasons}
    covered = {f for p in parts for f in p.factors}
    last = {f: Factor(f.size, "" if f in covered else reasons.get(f, "")) for row in slots for f in row}
    parts = [Part(p.points, tuple(last[f] for f in p.factors)) for p in parts]
    return tidy([[last[f] for f in row] for row in slots], parts)


def aligned(points: Points, labels: Sequence[Label], why: str) -> list[Label]:
    """Labels of equal rank whose dimensions, where they are not broadcast, are cut into the same factors."""
    rank = max(len(label.dims) for label in labels)
    labels = [Label(((),) * (rank - len(label.dims)) + label.dims, label.parts) for label in labels]
    for d in range(rank):
        bounds = set()
        for label in labels:
            bounds |= set(_bounds(label.dims[d]))
        steps = sorted(bounds)
        if any(b % a for a, b in pairwise(steps)):
            labels = [whole(points, label, d, why) for label in labels]
            continue
        for i, label in enumerate(labels):
            cuts = {}
            for f, low in zip(label.dims[d], _bounds(label.dims[d])[1:], strict=True):
                inside = [b for b in steps if low <= b <= low * f.size]
                cuts[f] = tuple(b // a for a, b in pairwise(inside))[::-1]
            labels[i] = cut(label, {f: sizes for f, sizes in cuts.items() if len(sizes) > 1})
    return labels


def _bounds(row: Sequence[Factor]) -> list[int]:
    """Strides of the places before, between and after the factors of a dimension."""
    return [prod(f.size for f in row[k:]) for k in range(len(row) + 1)]


def _pinned(points: Points, part: Part, reasons: dict[Factor, str]) -> bool:
    """Pins the axes of a part that meet fixed ones; is nothing left of it?"""
    axes = tuple(k for k, f in enumerate(part.factors) if f in reasons)
    if axes:
        points.pin(part.points, reasons[part.factors[axes[0]]], axes)
    return len(axes) == len(part.factors)


def _tie(points: Points, p: Part, q: Part, why: str) -> None:
    """Makes two parts that meet over common factors move together: the smaller one as blocks of the larger, else
    neither along these factors."""
    p, q = sorted((p, q), key=lambda part: -len(part.factors))
    common = [f for f in p.factors if f in q.factors]
    if not common:
        return
    array = p.ordered([*common, *(f for f in p.factors if f not in common)])
    rows = array.reshape(prod(f.size for f in common), -1)
    if len(common) == len(q.factors) and (p.factors[: len(common)] == tuple(common) or points.are_blocks(rows)):
        points.unite(points.rows(rows, why), q.ordered(common), why)
    else:
        points.pin(p.points, why, tuple(p.factors.index(f) for f in common))
        points.pin(q.points, why)


def split(points: Points, label: Label, dims: Iterable[int], why: str) -> None:
    """Lets indices in and out of `dims` move independently: a part over both moves block by block."""
    inside = {f for d in dims for f in label.dims[d]}
    for part in label.parts:
        outer = [f for f in part.factors if f not in inside]
        if outer and len(outer) < len(part.factors):
            _rows(points, part, outer, why)


def _rows(points: Points, part: Part, outer: Sequence[Factor], why: str) -> Part:
    array = part.ordered([*outer, *(f for f in part.factors if f not in outer)])
    shape = array.shape[: len(outer)]
    return Part(points.rows(array.reshape(prod(shape), -1), why).reshape(shape), tuple(outer))


def reduce(points: Points, label: Label, dims: Sequence[int], keep: bool, why: str) -> Label:
    """The label of a reduction that does not look at the order along `dims`."""
    gone = {f for d in dims for f in label.dims[d]}
    parts = []
    for part in label.parts:
        outer = [f for f in part.factors if f not in gone]
        if outer:
            parts.append(part if len(outer) == len(part.factors) else _rows(points, part, outer, why))
    rows = [() if d in dims else row for d, row in enumerate(label.dims) if keep or d not in dims]
    return tidy(rows, parts)


def cat(points: Points, labels: Sequence[Label], dim: int, why: str) -> Label:
    """The label of tensors put one after the other along a dimension."""
    labels = [whole(points, label, dim, why) for label in labels]
    sizes = [label.shape[dim] for label in labels]
    if not any(label.touching([dim]) for label in labels):
        reasons = [f.why for label in labels for f in label.dims[dim]]
        joined = join(points, [reduce(points, label, [dim], True, why) for label in labels], why)
        return replace(joined, dim, Factor(sum(sizes), next(filter(None, reasons), "order")))
    rests = [reduce(points, label, [dim], True, why) for label in labels]
    shared = {len(p.factors) for label in labels for p in label.touching([dim])}
    if shared != {1}:
        return _cat_blocks(points, labels, rests, dim, why)
    arrays = []
    for label, size in zip(labels, sizes, strict=True):
        arrays += [p.points for p in label.touching([dim])] or [still(points, size, why)]
    new = Factor(sum(sizes))
    part = Part(points.distinct(np.concatenate(arrays)), (new,))
    return replace(join(points, rests, why), dim, new, part)


def _cat_blocks(points: Points, labels: Sequence[Label], rests: Sequence[Label], dim: int, why: str) -> Label:
    """`cat` of parts that reach into other dimensions (head dimensions), if these are alike in all labels."""
    touching = [label.touching([dim]) for label in labels]
    others = [
        [
            (d, k)
            for p in ps
            for d, row in enumerate(label.dims)
            if d != dim
            for k, f in enumerate(row)
            if f in p.factors
        ]
        for label, ps in zip(labels, touching, strict=True)
    ]
    joined = join(points, rests, why)
    if (
        any(len(ps) != 1 for ps in touching)
        or any(o != others[0] for o in others)
        or not all(
            k < len(joined.dims[d]) and all(joined.dims[d][k].size == label.dims[d][k].size for label in labels)
            for d, k in others[0]
        )
    ):
        return cat(points, [drop(points, label, ps, why) for label, ps in zip(labels, touching, strict=True)], dim, why)
    arrays = [
        p.ordered([*(label.dims[d][k] for d, k in places), *label.dims[dim]])
        for label, (p,), places in zip(labels, touching, others, strict=True)
    ]
    outer = [joined.dims[d][k] for d, k in others[0]]
    new = Factor(sum(label.shape[dim] for label in labels))
    part = Part(points.distinct(np.concatenate(arrays, -1)), (*outer, new))
    rest = Label(joined.dims, tuple(p for p in joined.parts if set(p.factors).isdisjoint(outer)))
    return replace(rest, dim, new, part)


def contract(points: Points, labels: Sequence[Label], terms: Sequence[str], out: str, why: str) -> Label:
    """The label of an einsum: a product over letters, summed over those that are not in `out`."""
    letters = out + "".join(sorted(set("".join(terms)) - set(out)))
    spread = [
        Label(tuple(label.dims[term.index(a)] if a in term else () for a in letters), label.parts)
        for label, term in zip(labels, terms, strict=True)
    ]
    product = join(points, spread, why)
    return reduce(points, product, range(len(out), len(letters)), False, why)


def still(points: Points, size: int, why: str) -> Ids:
    """New points that do not move."""
    new = points.fresh(size)
    points.pin(new, why)
    return new

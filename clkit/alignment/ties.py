"""What happens where labels meet: elementwise operations, sums, concatenation, products."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod

import numpy as np

from clkit.alignment.labels import Factor, Label, Part, cut, drop, replace, tidy, whole
from clkit.alignment.points import Ids, Points


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

"""Labels: which points lie on the axes of a tensor, how they follow it, and what happens where labels meet.

A dimension of a tensor is a sequence of *factors* (outer to inner, their sizes multiply). A *span* is an array of
points over some factors: permuting the points permutes these factors jointly. A factor in no span is fixed if it has
a reason (`why`), else uniform: the tensor does not vary along it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np

from clkit.symmetry.points import Ids, Points


@dataclass(frozen=True, eq=False)
class Factor:
    """A piece of a dimension; `why` it is fixed ("" if it is uniform or in a span)."""

    size: int
    why: str = ""


@dataclass(frozen=True, eq=False)
class Span:
    """Points over some factors: axis k of `points` is `factors[k]`."""

    points: Ids
    factors: tuple[Factor, ...]

    def ordered(self, factors: Sequence[Factor]) -> Ids:
        """The points with their axes in the order of `factors`."""
        return self.points.transpose([self.factors.index(f) for f in factors])


@dataclass(frozen=True, eq=False)
class Label:
    """Factors for every dimension of a tensor and the spans over them."""

    dims: tuple[tuple[Factor, ...], ...]
    spans: tuple[Span, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the dimensions."""
        return tuple(prod(f.size for f in dim) for dim in self.dims)

    def span(self, factor: Factor) -> Span | None:
        """The span that holds a factor, if one does."""
        return next((p for p in self.spans if factor in p.factors), None)

    def touching(self, dims: Iterable[int]) -> list[Span]:
        """The spans with a factor in one of the dimensions."""
        inside = {f for d in dims for f in self.dims[d]}
        return [p for p in self.spans if not inside.isdisjoint(p.factors)]


def fixed(shape: Sequence[int], why: str) -> Label:
    """A label whose every axis is fixed."""
    return Label(tuple((Factor(n, why),) if n != 1 else () for n in shape))


def tidy(dims: Sequence[Sequence[Factor]], spans: Iterable[Span]) -> Label:
    """A label without factors of size 1 and with neighbours in one dimension merged where they are one axis."""
    kept = []
    for span in spans:
        factors = tuple(f for f in span.factors if f.size > 1)
        if factors:
            kept.append(Span(span.points.reshape([f.size for f in factors]), factors))
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


def _merge(outer: Factor, inner: Factor, spans: list[Span]) -> Factor | None:
    both = Factor(outer.size * inner.size, outer.why or inner.why)
    for i, span in enumerate(spans):
        if outer in span.factors or inner in span.factors:
            k = span.factors.index(outer) if outer in span.factors else len(span.factors)
            if span.factors[k + 1 : k + 2] != (inner,):
                return None
            shape = span.points.shape
            points = span.points.reshape(*shape[:k], both.size, *shape[k + 2 :])
            spans[i] = Span(points, (*span.factors[:k], both, *span.factors[k + 2 :]))
            return both
    return both if bool(outer.why) == bool(inner.why) else None


def cut(label: Label, cuts: dict[Factor, tuple[int, ...]]) -> Label:
    """Splits factors into several, outer to inner."""
    new = {f: tuple(Factor(n, f.why) for n in sizes) for f, sizes in cuts.items()}
    dims = tuple(tuple(g for f in dim for g in new.get(f, (f,))) for dim in label.dims)
    spans = []
    for span in label.spans:
        factors = tuple(g for f in span.factors for g in new.get(f, (f,)))
        spans.append(Span(span.points.reshape([f.size for f in factors]), factors))
    return Label(dims, tuple(spans))


def drop(points: Points, label: Label, spans: Iterable[Span], why: str) -> Label:
    """Pins some spans of a label and makes their factors fixed ones."""
    gone = {f: Factor(f.size, why) for span in spans for f in span.factors}
    for span in spans:
        points.pin(span.points, why)
    dims = [[gone.get(f, f) for f in dim] for dim in label.dims]
    return tidy(dims, [p for p in label.spans if p.factors[0] not in gone])


def reshape(points: Points, label: Label, shape: Sequence[int], why: str) -> Label:
    """The same elements, in row-major order, in another shape; pins everything if an axis is cut unevenly."""
    line = tidy([[f for dim in label.dims for f in dim]], label.spans)
    rest = [(f, f.size) for f in line.dims[0]]
    pieces: dict[Factor, list[int]] = {f: [] for f in line.dims[0]}
    lengths = []
    for n in shape:
        lengths.append(0)
        while n > 1:
            factor, left = rest.pop(0) if rest else (None, 0)
            take = left if left and n % left == 0 else n
            if factor is None or left % take:
                drop(points, label, label.spans, why)
                return fixed(shape, why)
            pieces[factor].append(take)
            lengths[-1] += 1
            n //= take
            if left > take:
                rest.insert(0, (factor, left // take))
    line = cut(line, {f: tuple(sizes) for f, sizes in pieces.items()})
    queue = iter(line.dims[0])
    return tidy([[next(queue) for _ in range(length)] for length in lengths], line.spans)


def reorder(label: Label, order: Sequence[int]) -> Label:
    """The dimensions in another order."""
    return Label(tuple(label.dims[d] for d in order), label.spans)


def flatten(points: Points, label: Label, dim: int, why: str) -> Label:
    """The label with one factor at most in a dimension: a flattened axis becomes points of its own."""
    if len(label.dims[dim]) < 2:
        return label
    spans = label.touching([dim])
    inside = [p for p in spans if set(p.factors) <= set(label.dims[dim])]
    label = drop(points, label, [p for p in spans if p not in inside[:1]], why)
    row = label.dims[dim]
    if len(row) < 2:
        return label
    one = Factor(prod(f.size for f in row), next((f.why for f in row if f.why), ""))
    new = []
    for span in label.touching([dim]):
        array = span.ordered([f for f in row if f in span.factors])
        repeats = [k for k, f in enumerate(row) if f not in span.factors]
        if repeats:
            array = np.broadcast_to(np.expand_dims(array, repeats), [f.size for f in row])
            index = tuple(np.indices(array.shape)[repeats])
            array = points.copies(array, np.asarray(np.ravel_multi_index(index, [row[k].size for k in repeats])))
        one = Factor(one.size)
        new.append(Span(array.reshape(-1), (one,)))
    keep = [p for p in label.spans if p not in label.touching([dim])]
    return Label((*label.dims[:dim], (one,), *label.dims[dim + 1 :]), (*keep, *new))


def gather(points: Points, label: Label, dim: int, index: Ids, why: str) -> Label:
    """The entries `index` (known beforehand) along a dimension."""
    if not len(index):
        return fixed([n if d != dim else 0 for d, n in enumerate(label.shape)], why)
    label = flatten(points, label, dim, why)
    if not label.dims[dim]:
        return label if len(index) == 1 else replace(label, dim, Factor(len(index)))
    (factor,) = label.dims[dim]
    new, span = Factor(len(index), factor.why), label.span(factor)
    if span is None:
        return replace(label, dim, new)
    axis = span.factors.index(factor)
    array = np.ascontiguousarray(span.points.take(index, axis))
    if len(np.unique(index)) < factor.size:
        points.recolour(array)
    factors = tuple(new if f is factor else f for f in span.factors)
    return replace(label, dim, new, Span(points.distinct(array), factors), span)


def replace(label: Label, dim: int, factor: Factor, span: Span | None = None, old: Span | None = None) -> Label:
    """The label with another factor as a dimension, and the span that holds it in place of `old`."""
    spans = [p for p in label.spans if p is not old] + ([span] if span else [])
    return tidy([*label.dims[:dim], (factor,), *label.dims[dim + 1 :]], spans)


def expand(label: Label, shape: Sequence[int]) -> Label:
    """The label of a tensor repeated along dimensions of size 1, and along new ones in front."""
    dims = ((),) * (len(shape) - len(label.dims)) + label.dims
    return Label(tuple(row if row or n == 1 else (Factor(n),) for row, n in zip(dims, shape, strict=True)), label.spans)


def join(points: Points, labels: Sequence[Label], why: str) -> Label:
    """The label of an elementwise operation with broadcasting: ties what meets, pins what meets a fixed axis."""
    labels = _aligned(points, labels, why)
    slots = []
    for rows in zip(*(label.dims for label in labels), strict=True):
        row = max(rows, key=lambda r: prod(f.size for f in r))
        slots.append(tuple(Factor(f.size) for f in row))
    met: list[Span] = []
    reasons: dict[Factor, str] = {}
    for label in labels:
        name: dict[Factor, Factor] = {}
        for row, place in zip(label.dims, slots, strict=True):
            name |= zip(row, place, strict=bool(row))
        met += [Span(p.points, tuple(name[f] for f in p.factors)) for p in label.spans]
        reasons |= {slot: f.why for f, slot in name.items() if f.why}
    spans: list[Span] = []
    for span in sorted(met, key=lambda p: -len(p.factors)):
        while other := next((p for p in spans if not set(p.factors).isdisjoint(span.factors)), None):
            spans.remove(other)
            both = {*other.factors, *span.factors}
            span = _tie(points, other, span, reasons, why)
            reasons = dict.fromkeys(both.difference(span.factors), why) | reasons
        spans.append(span)
    spans = [p for p in spans if not _pinned(points, p, reasons)]
    covered = {f for p in spans for f in p.factors}
    last = {f: Factor(f.size, "" if f in covered else reasons.get(f, "")) for row in slots for f in row}
    spans = [Span(p.points, tuple(last[f] for f in p.factors)) for p in spans]
    return tidy([[last[f] for f in row] for row in slots], spans)


def _aligned(points: Points, labels: Sequence[Label], why: str) -> list[Label]:
    """Labels of equal rank whose dimensions, where they are not broadcast, are cut into the same factors."""
    rank = max(len(label.dims) for label in labels)
    labels = [Label(((),) * (rank - len(label.dims)) + label.dims, label.spans) for label in labels]
    for d in range(rank):
        bounds = set()
        for label in labels:
            bounds |= set(_bounds(label.dims[d]))
        steps = sorted(bounds)
        if any(b % a for a, b in pairwise(steps)):
            labels = [flatten(points, label, d, why) for label in labels]
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


def _pinned(points: Points, span: Span, reasons: dict[Factor, str]) -> bool:
    """Pins the axes of a span that meet fixed ones; is nothing left of it?"""
    axes = tuple(k for k, f in enumerate(span.factors) if f in reasons)
    if axes:
        points.pin(span.points, reasons[span.factors[axes[0]]], axes)
    return len(axes) == len(span.factors)


def _tie(points: Points, p: Span, q: Span, still: Mapping[Factor, str], why: str) -> Span:
    """Makes two spans that share factors move together, and returns what is left of both.

    The smaller one becomes blocks of the larger. Where that cannot be, the rest of the factors is fixed; or what they
    share is, where the larger one's outermost factor (heads) is not in it and stands not `still` anyway.
    """
    big, small = sorted((p, q), key=lambda span: -len(span.factors))
    common = [f for f in big.factors if f in small.factors]
    rest = [f for f in big.factors if f not in small.factors]
    array = big.ordered([*common, *rest]).reshape(prod(f.size for f in common), -1)
    if len(common) == len(small.factors) and (big.factors[: len(common)] == tuple(common) or points.are_blocks(array)):
        blocks = points.rows(array)
        if blocks is not None:
            points.unite(blocks, small.ordered(common), why)
            return big
    if big.factors[0] in common or all(f in still for f in rest):
        big, small = columns(points, big, common, why), columns(points, small, common, why)
        points.unite(big.points, small.points, why)
    else:
        points.pin(big.points, why, tuple(big.factors.index(f) for f in common))
        points.pin(small.points, why)
    return big


def columns(points: Points, span: Span, keep: Sequence[Factor], why: str) -> Span:
    """Fixes the other factors of a span: what lies on them moves as one with each index of those to `keep`."""
    array = span.ordered([*keep, *(f for f in span.factors if f not in keep)])
    if array.ndim > len(keep):
        array = array.reshape(*array.shape[: len(keep)], -1)
        points.pin(array, why, (len(keep),))
        while width := array.shape[-1] // 2:  # by halves, for one partner each is united at once
            points.unite(array[..., :width], array[..., -width:], why)
            array = array[..., :-width]
        array = array[..., 0]
    return Span(array, tuple(keep))


def settle(points: Points, label: Label, dims: Iterable[int], why: str) -> Label:
    """Fixes every index along some dimensions, also where the tensor did not vary along them."""
    inside = {f: Factor(f.size, f.why or why) for d in dims for f in label.dims[d]}
    spans = []
    for span in label.spans:
        outer = [f for f in span.factors if f not in inside]
        if len(outer) == len(span.factors):
            spans.append(span)
        elif outer:
            spans.append(columns(points, span, outer, why))
        else:
            points.pin(span.points, why)
    return tidy([[inside.get(f, f) for f in row] for row in label.dims], spans)


def separate(points: Points, label: Label, dims: Iterable[int], why: str) -> Label:
    """Lets indices in and out of `dims` move independently: a span over both becomes blocks and their members."""
    return _parted(points, label, {f for d in dims for f in label.dims[d]}, why)[0]


def _parted(points: Points, label: Label, inside: set[Factor], why: str) -> tuple[Label, list[Span]]:
    """The label with spans over factors inside and outside of a set as blocks and members; and the blocks' spans.

    Blocks are at each index of the outer factors. Where these cross what is a block already, the shorter side is fixed.
    """
    kept, blocks, lost = [], [], {}
    for span in label.spans:
        outer = [f for f in span.factors if f not in inside]
        inner = [f for f in span.factors if f in inside]
        array = span.ordered([*outer, *inner])
        rows = points.rows(array.reshape(prod(array.shape[: len(outer)]), -1)) if outer and inner else array
        if rows is None:
            stays, goes = sorted((inner, outer), key=lambda side: -prod(f.size for f in side))
            span = columns(points, span, stays, why)
            lost |= {f: Factor(f.size, why) for f in goes}
            blocks += [span] if stays is outer else []
        elif outer:
            blocks.append(Span(rows.reshape(array.shape[: len(outer)]), tuple(outer)))
        kept.append(span)
    return Label(tuple(tuple(lost.get(f, f) for f in row) for row in label.dims), tuple(kept)), blocks


def reduce(points: Points, label: Label, dims: Sequence[int], keep: bool, why: str) -> Label:
    """The label of a reduction that does not look at the order along `dims`."""
    label, blocks = _parted(points, label, {f for d in dims for f in label.dims[d]}, why)
    return tidy([() if d in dims else row for d, row in enumerate(label.dims) if keep or d not in dims], blocks)


def cat(points: Points, labels: Sequence[Label], dim: int, why: str) -> Label:
    """The label of tensors put one after the other along a dimension.

    Spans may reach into other dimensions (heads), if they do so alike in all labels; else they are pinned.
    """
    labels = [flatten(points, label, dim, why) for label in labels]
    spans = [label.touching([dim]) for label in labels]
    joined = join(points, [reduce(points, label, [dim], True, why) for label in labels], why)
    new = Factor(sum(label.shape[dim] for label in labels))
    if not any(spans):
        reasons = [f.why for label in labels for f in label.dims[dim] if f.why]
        return replace(joined, dim, Factor(new.size, reasons[0] if reasons else "order"))
    spots = [_spots(label, dim) for label in (joined, *labels)]
    held = [{f for span in some for f in span.factors} for some in spans]
    places = [[place for place, f in at.items() if f in some] for at, some in zip(spots[1:], held, strict=True)]
    wide = max(places, key=len)
    one = all(len(some) == 1 for some in spans) and all(place == wide for place in places)
    if wide and not (one and all(place in spots[0] for place in wide)):
        labels = [drop(points, label, some, why) for label, some in zip(labels, spans, strict=True)]
        return cat(points, labels, dim, why)
    arrays = []
    for label, some, at in zip(labels, spans, spots[1:], strict=True):
        factors = [*(at[place] for place in wide), *label.dims[dim]]
        arrays.append(some[0].ordered(factors) if some else loose(points, label, dim, why))
    outer = [spots[0][place] for place in wide]
    rest = Label(joined.dims, tuple(p for p in joined.spans if set(p.factors).isdisjoint(outer)))
    return replace(rest, dim, new, Span(points.distinct(np.concatenate(arrays, -1)), (*outer, new)))


def _spots(label: Label, but: int) -> dict[tuple[int, int, int], Factor]:
    """The factors of all dimensions but one, by dimension, stride and size."""
    rows = [(d, row, _bounds(row)[1:]) for d, row in enumerate(label.dims) if d != but]
    return {(d, step, f.size): f for d, row, steps in rows for f, step in zip(row, steps, strict=True)}


def loose(points: Points, label: Label, dim: int, why: str) -> Ids:
    """New points for a dimension in no span: free ones if the tensor does not vary along it, else such that stand."""
    new = points.fresh(label.shape[dim])
    if any(f.why for f in label.dims[dim]):
        points.pin(new, why)
    return new

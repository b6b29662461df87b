"""Points, units, colours, blocks and orbits: the structure that a walk through a graph refines.

Two invariants hold at all times. Every method shrinks the group of permutations that the finished structure allows,
and none widens it: so an operation that commutes with every permutation still does after whatever follows. And blocks
form a forest: no unit lies in itself. The package's door explains the words.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
DEPTH = 64  # how deep blocks may lie in blocks


@dataclass(frozen=True, eq=False)
class Orbits:
    """The finished structure, one entry a point: its unit, its colour, its block (a unit, or -1), its orbit.

    Units of one orbit with one block may replace each other, and so may their blocks. `reasons[why]` says why a point
    was pinned (0: it was not).
    """

    unit: Ids
    colour: Ids
    block: Ids
    orbit: Ids
    why: Ids
    reasons: list[str]


class Points:
    """A growing set of points with units, colours and blocks; arrays of point ids stand for axes of tensors."""

    def __init__(self) -> None:
        self.count, self.colours = 0, 0
        self._root, self._colour, self._block, self._why = (np.empty(0, np.int64) for _ in range(4))
        self._next = np.empty(0, np.int64)  # the members of a unit form a ring
        self._links: list[tuple[Ids, Ids]] = []  # points, and for each that of the row it is in
        self._rows: dict[tuple, Ids] = {}  # what `rows` gave for a matrix
        self._reasons = [""]

    def fresh(self, *shape: int) -> Ids:
        """New points in one new colour: they may replace each other freely."""
        n = int(np.prod(shape))
        if self.count + n > len(self._root):
            room = np.full(max(len(self._root), n, 1024), -1)
            self._root, self._colour = np.append(self._root, room), np.append(self._colour, room)
            self._block, self._why = np.append(self._block, room), np.append(self._why, room)
            self._next = np.append(self._next, room)
        new = np.arange(self.count, self.count + n)
        self._root[new], self._colour[new], self._block[new], self._why[new] = new, self.colours, -1, 0
        self._next[new], self.count, self.colours = new, self.count + n, self.colours + 1
        return new.reshape(shape)

    def units_of(self, points: Ids) -> Ids:
        """The unit of every point, named by one of its members."""
        root = self._root[points]
        while not np.array_equal(up := self._root[root], root):
            root = up
        self._root[points] = root
        return root

    def blocks_of(self, points: Ids) -> Ids:
        """The unit of the block around every point, -1 where there is none."""
        block = self._block[self.units_of(points)]
        inside = block >= 0
        block[inside] = self.units_of(block[inside])
        return block

    def recolour(self, points: Ids, tags: Ids | int = 0) -> None:
        """Refines colours by tags: of points, and of all in their units. Only equal tags may replace each other."""
        first = points.ravel()
        tags = np.broadcast_to(np.broadcast_to(tags, points.shape).ravel(), first.shape)
        one = np.unique(self.units_of(first), return_index=True)[1]
        every = self._rings(first[one])
        self._refine(every.ravel(), np.broadcast_to(tags[one], every.shape).ravel())
        self._refine(first, tags)  # a unit with several of the points got the tag of one

    def _rings(self, first: Ids) -> Ids:
        """All points of the units of some, one column each, which repeats its first where others are longer."""
        ring, members = self._next[first], [first]
        while (open_ := ring != first).any():
            members.append(np.where(open_, ring, first))
            ring = np.where(open_, self._next[ring], first)
        return np.stack(members)

    def _refine(self, points: Ids, tags: Ids) -> None:
        codes = _codes(self._colour[points], tags)
        self._colour[points] = self.colours + codes
        self.colours += int(codes.max(initial=-1)) + 1

    def pin(self, points: Ids, why: str, axes: tuple[int, ...] | None = None) -> None:
        """Fixes the index along some axes (default: all) of an array of points; `why` is kept for the report."""
        axes = tuple(range(points.ndim)) if axes is None else axes
        shape = tuple(points.shape[a] for a in axes)
        self.recolour(points, np.asarray(np.ravel_multi_index(tuple(np.indices(points.shape)[list(axes)]), shape)))
        if why not in self._reasons:
            self._reasons.append(why)
        self._why[points[self._why[points] == 0]] = self._reasons.index(why)

    def copies(self, points: Ids, tags: Ids) -> Ids:
        """New points in the units of `points`: a repeated axis. Equal tags keep equal colours."""
        new = self.fresh(*points.shape)
        self.recolour(new, _codes(self._colour[points].ravel(), tags.ravel()).reshape(points.shape))
        self._unite(new.ravel(), points.ravel(), "copies")
        return new

    def distinct(self, points: Ids) -> Ids:
        """The array itself, or copies of its points where some occur more than once."""
        flat = points.ravel()
        order = np.argsort(flat, kind="stable")
        starts = np.r_[True, np.diff(flat[order]) != 0]
        if starts.all():
            return points
        occurrence = np.empty_like(flat)
        occurrence[order] = np.arange(len(flat)) - np.flatnonzero(starts)[np.cumsum(starts) - 1]
        return self.copies(points, occurrence.reshape(points.shape))

    def are_blocks(self, points: Ids) -> bool:
        """Are the rows of a matrix of points blocks already, each another one?"""
        around = self.blocks_of(points)
        return bool((around >= 0).all() and (around == around[:, :1]).all()) and len(np.unique(around)) == len(points)

    def rows(self, points: Ids) -> Ids | None:
        """Makes the rows of a matrix of points move as wholes: a point for each row, None where rows cross blocks."""
        if points.shape[1] == 1:
            return points[:, 0]
        if (key := (points.shape, points.tobytes())) in self._rows:
            return self._rows[key]
        members = self.units_of(points)
        if (members == members[:, :1]).all():
            new = self.fresh(len(points))
            self._unite(new, members[:, 0], "")
        else:
            new = self._wrap([np.unique(row) for row in members])
        if new is not None:
            self._rows[key] = new
            self._links.append((points.ravel(), np.repeat(new, points.shape[1])))
        return new

    def _wrap(self, members: list[Ids]) -> Ids | None:
        """Puts sets of units into blocks, each set into another one; None where they cross."""
        flat, lengths = np.concatenate(members), [len(some) for some in members]
        around = self.blocks_of(flat)
        if len(np.unique(flat)) < len(flat) or ((around < 0).any() and (around >= 0).any()):
            return None
        wider = [np.unique(some) for some in np.split(around, np.cumsum(lengths)[:-1])]
        if (around >= 0).all() and max(map(len, wider)) > 1:
            return self._wrap(wider)
        new, outer = self.fresh(len(members)), np.concatenate(wider)
        if (outer >= 0).all() and len(np.unique(outer)) == len(outer):
            self._unite(new, outer, "")
            return new
        if (outer >= 0).all():
            self._put(new, outer)
        self._put(flat, np.repeat(new, lengths))
        return new

    def unite(self, a: Ids, b: Ids, why: str) -> None:
        """Makes the points of `a` and `b` move together, position by position."""
        a, b = a.ravel(), b.ravel()
        one, other = self._colour[a], self._colour[b]
        pairs = int(_codes(one, other).max(initial=-1)) + 1
        if pairs > len(np.unique(one)):
            self.recolour(a, other)
        if pairs > len(np.unique(other)):
            self.recolour(b, one)
        self._unite(a, b, why)

    def _put(self, units: Ids, blocks: Ids) -> None:
        old = self.blocks_of(units)
        new = self.blocks_of(np.broadcast_to(blocks, old.shape))
        assert ((old < 0) | (old == new)).all(), "a unit leaves its block"
        self._block[units] = blocks

    def _unite(self, a: Ids, b: Ids, why: str) -> None:
        while True:
            one, other = self.units_of(a), self.units_of(b)
            todo = one != other
            if not todo.any():
                return
            pairs = np.stack([np.minimum(one, other)[todo], np.maximum(one, other)[todo]], axis=1)
            first = np.zeros(pairs.size, bool)
            first[np.unique(pairs, return_index=True)[1]] = True
            low, high = pairs[first.reshape(-1, 2).all(axis=1)].T
            block = self._join_blocks(self.blocks_of(low), self.blocks_of(high), why)
            if block is None:
                break
            if (self.units_of(low) != low).any() or (self.units_of(high) != high).any():
                continue  # their blocks were among them
            if self._circular(low, high, block):
                break
            self._root[high], self._block[low] = low, block
            self._next[low], self._next[high] = self._next[high], self._next[low]
            self._tell_apart(low, why)
        self.pin(a, why)
        self.pin(b, why)

    def _tell_apart(self, units: Ids, why: str) -> None:
        """Pins units with a colour twice: which of the two would go to which of another's is not known."""
        members = self._rings(units)
        padding = np.arange(-len(members), 0)[1:, None]
        colours = self._colour[members]
        colours[1:] = np.where(members[1:] == members[0], padding, colours[1:])
        twice = (np.diff(np.sort(colours, axis=0), axis=0) == 0).any(axis=0)
        if twice.any():
            self.pin(np.unique(members[:, twice]), why)

    def _join_blocks(self, x: Ids, y: Ids, why: str) -> Ids | None:
        """Ties the blocks of units that become one; returns the innermost, None where they cross."""
        inner = np.where(x >= 0, x, y)
        clash = (x >= 0) & (y >= 0) & (x != y)
        if not clash.any():
            return inner
        pairs = np.unique(np.stack([x[clash], y[clash]]), axis=1)
        each = len(np.unique(pairs[0])), len(np.unique(pairs[1]))
        if pairs.shape[1] not in each:
            return None
        if each[0] == each[1]:
            self._unite(pairs[0], pairs[1], why)
            return inner
        side = each.index(pairs.shape[1])
        fine, coarse = pairs[side], pairs[1 - side]
        around = self.blocks_of(fine)
        if (around >= 0).all():
            self._unite(around, coarse, why)
        elif (around >= 0).any():
            return None
        elif self._circular(fine, fine, coarse):
            return None
        else:
            self._put(fine, coarse)
        inner[clash] = (x, y)[side][clash]
        return inner

    def _circular(self, low: Ids, high: Ids, block: Ids) -> bool:
        """Whether blocks would lie in themselves, if `high` were the units `low` and these lay in `block`."""
        old, new = np.concatenate([low, high]), np.concatenate([block, block])
        order = np.argsort(old)
        old, new, up = old[order], new[order], block
        for _ in range(DEPTH):
            up = np.unique(self.units_of(up[up >= 0]))
            if not len(up):
                return False
            place = np.minimum(np.searchsorted(old, up), len(old) - 1)
            up = np.where(old[place] == up, new[place], self.blocks_of(up))
        return True

    def finish(self) -> Orbits:
        """Sorts the units into orbits: colour refinement by the orbits of members and blocks, until nothing changes."""
        everything = np.arange(self.count)
        unit, colour, block = self.units_of(everything), self._colour[everything], self.blocks_of(everything)
        up = np.unique(block)
        for _ in range(DEPTH):
            up = np.unique(self.blocks_of(up[up >= 0]))
        assert (up < 0).all(), "a block lies in itself"
        inside, rows = (np.concatenate([some[k] for some in self._links] or [up[:0]]) for k in (0, 1))
        members = np.unique(unit[block >= 0])
        orbit, found = np.zeros(self.count, np.int64), ()
        while found != (found := (len(np.unique(colour)), len(np.unique(orbit)))):
            row = _codes(colour[rows], orbit[unit[rows]])
            colour = _codes(colour, _signatures(inside, row, self.count))
            own = _signatures(unit, colour, self.count)[unit]
            inner = _signatures(block[members], orbit[members], self.count)[unit]
            outer = np.where(block >= 0, orbit[block], -1)
            orbit = _codes(orbit, own, inner, outer)
        return Orbits(unit, colour, block, orbit, self._why[everything], self._reasons)


def _codes(*keys: Ids) -> Ids:
    """Numbers the different combinations of some keys, from 0."""
    codes = np.zeros(len(keys[0]), np.int64)
    for key in keys:
        values = np.unique(key, return_inverse=True)[1]
        codes = np.unique(codes * (int(values.max(initial=0)) + 1) + values, return_inverse=True)[1]
    return codes


def _signatures(owner: Ids, value: Ids, size: int) -> Ids:
    """Numbers, for each of `size` owners, the collections of their values; -1 for owners of none."""
    order = np.lexsort((value, owner))
    owner, value = owner[order], value[order]
    names, starts, counts = np.unique(owner, return_index=True, return_counts=True)
    numbers, used = np.full(size, -1, np.int64), 0
    for count in np.unique(counts):
        same = counts == count
        table = value[starts[same][:, None] + np.arange(count)]
        numbers[names[same]] = used + np.unique(table, axis=0, return_inverse=True)[1].ravel()
        used += len(table)
    return numbers

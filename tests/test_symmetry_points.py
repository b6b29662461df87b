"""Laws of points: whatever is asked of them holds in every permutation that is left, in whatever order it was asked."""

from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit.symmetry.points import Ids, Orbits, Points


def drawn(orbits: Orbits, random: np.random.Generator) -> Ids:
    """A random element of the group that orbits describe: where every point goes."""
    goes = np.arange(len(orbits.unit))
    members: dict[tuple[int, int], list[int]] = defaultdict(list)  # units by block and orbit
    points: dict[int, list[int]] = defaultdict(list)
    for point, unit in enumerate(orbits.unit.tolist()):
        points[unit].append(point)
    for unit in points:
        members[int(orbits.block[unit]), int(orbits.orbit[unit])].append(unit)

    def send(block: int, to: int) -> None:
        for (outer, orbit), units in members.items():
            if outer == block:
                for unit, new in zip(units, random.permutation(members[to, orbit]).tolist(), strict=True):
                    colours = {orbits.colour[p]: p for p in points[new]}
                    if len(colours) == len(points[new]):
                        goes[points[unit]] = [colours[orbits.colour[p]] for p in points[unit]]
                    else:
                        assert unit == new, "a unit with a colour twice moves"
                    send(unit, new)

    send(-1, -1)
    return goes


class Story:
    """Points to whom random things happen, with what each of these promises."""

    def __init__(self, seed: int) -> None:
        self.random, self.points = np.random.default_rng(seed), Points()
        self.axes: list[Ids] = []
        self.matrices: list[Ids] = []
        self.promises: list[tuple[str, Ids, Ids]] = []  # kind, points, what is kept along with them

    def axis(self) -> Ids:
        return self.axes[self.random.integers(len(self.axes))]

    def matrix(self) -> Ids:
        if self.matrices and self.random.random() < 0.3:
            return self.matrices[self.random.integers(len(self.matrices))]
        axis = self.axis()
        height = self.random.choice([n for n in range(1, axis.size + 1) if axis.size % n == 0])
        matrix = axis.reshape(height, -1)
        self.matrices.append(matrix.T if self.random.random() < 0.5 else matrix)
        return self.matrices[-1]

    def happen(self) -> None:
        match self.random.choice(["fresh", "unite", "shift", "pin", "rows", "slice", "copies", "members"]):
            case "fresh":
                self.axes.append(self.points.fresh(int(self.random.choice([2, 4, 6, 12]))))
            case "unite":
                a = self.axis()
                b = next((b for b in self.axes if b.size == a.size and b is not a), None)
                if b is not None:
                    self.tie(a, self.random.permutation(b) if self.random.random() < 0.3 else b)
            case "shift":
                a = self.axis()
                self.tie(a, a[::-1] if self.random.random() < 0.5 else np.roll(a, a.size // 2))
            case "pin":
                matrix = self.matrix()
                self.points.pin(matrix, "asked", (1,))
                self.promises.append(("tag", matrix.ravel(), np.indices(matrix.shape)[1].ravel()))
            case "rows":
                matrix = self.matrix()
                rows = self.points.rows(matrix)
                if rows is not None:
                    self.promises.append(("along", matrix.ravel(), np.repeat(rows, matrix.shape[1])))
                    self.axes.append(rows)
            case "slice":
                a = self.axis()
                part = a[: max(a.size // 2, 1)]
                self.points.recolour(part)
                self.promises.append(("tag", part, np.zeros_like(part)))
                self.axes.append(part)
            case "copies":
                twice = np.tile(self.axis(), 2)
                self.axes.append(self.points.distinct(twice))
                self.promises.append(("along", self.axes[-1], twice))
            case _:
                a = self.axis()
                tags = self.random.integers(0, 2, a.size)
                self.points.recolour(a, tags)
                self.promises.append(("tag", a, tags))

    def tie(self, a: Ids, b: Ids) -> None:
        self.points.unite(a, b, "asked")
        self.promises += [("along", a, b), ("along", b, a)]

    def check(self, goes: Ids) -> None:
        for axis in self.axes:
            assert set(goes[axis]) == set(axis), "an axis is left"
        for kind, points, kept in self.promises:
            place = {p: k for k, p in enumerate(points.tolist())}
            for point, new in zip(points.tolist(), goes[points].tolist(), strict=True):
                if new in place:
                    before, after = kept[place[point]], kept[place[new]]
                    assert after == (before if kind == "tag" else goes[before]), kind


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_what_is_promised_holds_in_all_permutations_that_are_left(seed):
    story = Story(seed)
    story.axes.append(story.points.fresh(12))
    for _ in range(12):
        story.happen()
    orbits = story.points.finish()
    for _ in range(4):
        story.check(drawn(orbits, story.random))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_nothing_widens_the_group(seed):
    story = Story(seed)
    story.axes.append(story.points.fresh(6))
    for _ in range(6):
        story.happen()
    early, count = story.points.finish(), story.points.count
    for _ in range(6):
        story.happen()
    goes = drawn(story.points.finish(), story.random)[:count]
    alike: dict[int, int] = {}
    for point, new in enumerate(goes.tolist()):
        assert early.colour[point] == early.colour[new]
        assert early.orbit[point] == early.orbit[new]
        assert alike.setdefault(int(early.unit[point]), int(early.unit[new])) == early.unit[new]
        block = early.block[point]
        assert (block < 0) == (early.block[new] < 0)
        if block >= 0:
            assert alike.setdefault(int(block), int(early.block[new])) == early.block[new]

"""The permutation symmetry of a model as plain data, its elements, and what they do to weights.

A symmetry is groups of units, the axes of weights that the units lie on, and, for what does not move, the operation
that is to blame. An element of it is a permutation of the units of each group.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from clkit import checks
from clkit.modules import called
from clkit.symmetry.points import Ids
from clkit.symmetry.program import Program, mode, trace
from clkit.weights import Weights, live_tensors


@dataclass(frozen=True)
class Group:
    """Units that may replace each other: `size` of them in each unit of the group `within`, if there is one.

    A permutation of a group is one row of `units` numbers; `size` units in sequence share a block.
    """

    name: str
    size: int
    within: str | None = None
    blocks: int = 1

    @property
    def units(self) -> int:
        """The number of units in all blocks together."""
        return self.size * self.blocks


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a weight: position i follows unit `index[i]` of group number `group[i]` (-1: it stands still).

    `lane` tells apart the positions that follow one unit; `reason` numbers why a position stands still. For the
    inputs of a grouped convolution, the arrays have a row for each group of the convolution.
    """

    group: Ids
    index: Ids
    lane: Ids
    reason: Ids


@dataclass(frozen=True, eq=False)
class Tap:
    """A value of the graph that shows units: the result of `node`, where operations that mix channels read it.

    Each dimension of the value is split into `sizes` (-1: what is left); the new dimensions `places`, flattened,
    hold the positions; `slots[group]` has one row of positions, in the order of the group's units, for each lane.
    """

    node: str
    sizes: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]
    slots: dict[str, Ids]

    def read(self, value: Tensor) -> Tensor:
        """A view of the value with the dimensions that hold positions of the part in front."""
        for dim in reversed(range(len(self.sizes))):
            if self.sizes[dim]:
                value = value.unflatten(dim, self.sizes[dim])
        return value.movedim(self.places, tuple(range(len(self.places))))


def slots_of(group: Ids, index: Ids, lane: Ids) -> dict[int, Ids]:
    """For each group that some positions follow: which ones, a row for each lane, in the order of the group's units."""
    found = {}
    for g in (g for g in dict.fromkeys(group.tolist()) if g >= 0):
        here = np.flatnonzero(group == g)
        here = here[np.lexsort((index[here], lane[here]))]
        found[g] = here.reshape(-1, len(np.unique(index[here])))
    return found


@dataclass(frozen=True)
class Row:
    """What one axis of one weight follows, in words."""

    parameter: str
    axis: int
    size: int
    follows: str


@dataclass(frozen=True)
class Proof:
    """What a random permutation did: the relative change of the output, whether it `holds`, what moved, what not."""

    change: float
    holds: bool
    share: float
    groups: int
    frozen: dict[str, int]


class Table(list[Row]):
    """Rows that print as a table."""

    def __str__(self) -> str:
        cells = [("parameter", "axis", "size", "follows")]
        cells += [(r.parameter, str(r.axis), str(r.size), r.follows) for r in self]
        widths = [max(len(c[k]) for c in cells) for k in range(3)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in cells)


@dataclass(frozen=True, eq=False, repr=False)
class Symmetry:
    """Which axes of which weights may be permuted together without a change of the function."""

    groups: dict[str, Group]
    axes: dict[str, tuple[Axis, ...]]
    reasons: tuple[str, ...]
    buffers: frozenset[str]
    taps: tuple[Tap, ...]
    program: Program
    example: Any

    @property
    def share(self) -> float:
        """The share of the parameters' elements that can move: those with a moving position on one axis at least.

        Parameters whose only axes are the model's outputs (the classifier's bias) cannot move and do not count.
        """
        moved = total = 0.0
        for name, axes in self.axes.items():
            still = [float((axis.group < 0).mean()) for axis in axes]
            bound = all(self.reasons[r] == "output" for axis in axes for r in axis.reason.ravel() if r)
            if name not in self.buffers and not (prod(still) == 1 and bound):
                size = prod(axis.group.shape[-1] for axis in axes)
                moved, total = moved + size * (1 - prod(still)), total + size
        return moved / total if total else 0.0

    @property
    def frozen(self) -> dict[str, int]:
        """Why positions on the weights' axes stand still: reason -> how many."""
        counts: dict[str, int] = {}
        for axes in self.axes.values():
            for axis in axes:
                still = axis.reason[axis.reason > 0]
                for number, n in zip(*np.unique(still, return_counts=True), strict=True):
                    counts[self.reasons[number]] = counts.get(self.reasons[number], 0) + int(n)
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def table(self) -> Table:
        """One row for each axis of each weight; `a | b` puts groups one after the other, `a x 4` is one four times."""
        names = list(self.groups)
        return Table(
            Row(name, k, axis.group.shape[-1], self._words(axis, names))
            for name, axes in self.axes.items()
            for k, axis in enumerate(axes)
        )

    @torch.no_grad()
    def verify(
        self,
        model: nn.Module,
        example: Any = None,
        tolerance: float = 1e-4,
        *,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> "Proof":
        """Permutes the model's weights at random and measures how much its output on `example` changes.

        The model runs as it is, in evaluation mode, not as the graph that the symmetry was derived from. `example`
        defaults to the one of the derivation; `dtype` casts model and example first (the model itself is left alone).
        """
        net = copy.deepcopy(model).to(dtype) if dtype else model
        args = self.example if example is None else example
        args = args if isinstance(args, tuple) else (args,)
        args = tree_map(lambda t: t.to(dtype) if dtype and isinstance(t, Tensor) and t.is_floating_point() else t, args)
        weights = live_tensors(net)
        moved = permute(self, random_permutations(self, generator or torch.Generator().manual_seed(0)), weights)
        with mode(net, training=False):
            before, after = (
                [t for t in tree_leaves(called(net, w, args)) if isinstance(t, Tensor)] for w in (weights, moved)
            )
        change = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True))
        return Proof(change, change < tolerance, self.share, len(self.groups), self.frozen)

    @torch.no_grad()
    def watch(
        self,
        model: nn.Module,
        nets: Sequence[Weights],
        inputs: Tensor,
        look: Callable[[Tap, list[Tensor]], None],
        batch: int,
    ) -> None:
        """Runs several networks side by side on `inputs` (N, ...), `batch` rows at a time, and shows units at work.

        `look(tap, values)` sees the value of each tap in every network, as soon as it is there. Raises ValueError for
        a model of several inputs.
        """
        if len(self.program.inputs) != 1:
            raise ValueError(f"model: it takes {len(self.program.inputs)} tensors; only models of one can be watched")
        device = next(model.parameters(), inputs).device
        nets = [{name: t.to(device) for name, t in w.items()} for w in nets]
        taps: dict[str, list[Tap]] = {}
        for tap in self.taps:
            taps.setdefault(tap.node, []).append(tap)

        def show(node: str, values: list[Tensor]) -> None:
            for tap in taps.get(node, ()):
                look(tap, values)

        programs: dict[int, Program] = {}
        for x in (part.to(device) for part in inputs.split(batch)):
            if len(x) not in programs:  # the graph may be bound to another batch size or device
                fits = self.program.batch in (None, len(x)) and self.program.device == device
                programs[len(x)] = self.program if fits else trace(model, x)
            programs[len(x)].run(nets, x, show)

    @cached_property
    def members(self) -> dict[str, list[str]]:
        """For each group, the groups whose blocks its units are."""
        return {name: [g.name for g in self.groups.values() if g.within == name] for name in self.groups}

    @property
    def roots(self) -> list[str]:
        """The groups that lie in no block."""
        return [name for name, group in self.groups.items() if group.within is None]

    def root(self, name: str) -> str:
        """The outermost of the groups around a group, or itself."""
        while outer := self.groups[name].within:
            name = outer
        return name

    def family(self, name: str) -> list[str]:
        """A group and all that lie in it."""
        return [name, *(g for m in self.members[name] for g in self.family(m))]

    @cached_property
    def places(self) -> dict[str, list[tuple[str, int, Ids]]]:
        """Where parameters hold each group: name, axis, positions (lanes, units).

        Weights of grouped convolutions are left out: what lies on one axis depends on the other.
        """
        found: dict[str, list[tuple[str, int, Ids]]] = {name: [] for name in self.groups}
        names = list(self.groups)
        for weight, axes in self.axes.items():
            if weight in self.buffers or any(axis.group.ndim > 1 for axis in axes):
                continue
            for dim, axis in enumerate(axes):
                for g, slots in slots_of(axis.group, axis.index, axis.lane).items():
                    found[names[g]].append((weight, dim, slots))
        return found

    def _words(self, axis: Axis, names: list[str]) -> str:
        group, words = axis.group.ravel(), []
        for g in dict.fromkeys(group.tolist()):
            here = group == g
            if g < 0:
                reasons = dict.fromkeys(self.reasons[r] for r in axis.reason.ravel()[here])
                words.append(f"fixed ({', '.join(list(reasons)[:2])})")
                continue
            times = np.unique(axis.index.ravel()[here], return_counts=True)[1]
            words.append(names[g] + (f" x {times[0]}" if times[0] > 1 else ""))
        return " | ".join(words[:6]) + (f" | ... {len(words) - 6} more" if len(words) > 6 else "")

    def __repr__(self) -> str:
        lines = [f"Symmetry: {len(self.groups)} groups move {self.share:.1%} of the parameters"]
        for group in list(self.groups.values())[:40]:
            inside = f" in each of {group.blocks} {group.within}" if group.within else ""
            lines.append(f"  {group.name}: {group.size}{inside}")
        if len(self.groups) > 40:
            lines.append(f"  ... {len(self.groups) - 40} more")
        why = ", ".join(f"{reason} ({n})" for reason, n in list(self.frozen.items())[:8])
        return "\n".join([*lines, f"fixed positions: {why or 'none'}"])


Permutations = Mapping[str, Tensor]
"""For each group, which unit comes to each place: place i takes what was at `permutations[group][i]`."""


def identity(symmetry: Symmetry) -> dict[str, Tensor]:
    """The permutations that leave everything where it is: for each group a tensor (units,) of the numbers in order."""
    return {name: torch.arange(group.units) for name, group in symmetry.groups.items()}


def random_permutations(symmetry: Symmetry, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Draws an element of the symmetry uniformly: blocks change places, and their members within them.

    For each group it gives a tensor (units,), on the CPU.
    """
    drawn: dict[str, Tensor] = {}

    def draw(name: str) -> Tensor:
        if name not in drawn:
            group = symmetry.groups[name]
            block = draw(group.within) if group.within else torch.zeros(1, dtype=torch.int64)
            inner = [torch.randperm(group.size, generator=generator) for _ in range(group.blocks)]
            drawn[name] = (block[:, None] * group.size + torch.stack(inner)).flatten()
        return drawn[name]

    return {name: draw(name) for name in symmetry.groups}


def compose(first: Permutations, then: Permutations) -> dict[str, Tensor]:
    """One element (units,) a group for two: permuting by the result is permuting by `first`, then by `then`.

    Raises ValueError for permutations of different groups.
    """
    if first.keys() != then.keys():
        raise ValueError(
            f"first and then: groups differ ({sorted(first.keys() ^ then.keys())[:3]}); use one symmetry's permutations"
        )
    return {name: first[name][then[name]] for name in first}


def invert(permutations: Permutations) -> dict[str, Tensor]:
    """The element that undoes `permutations`, (units,) a group."""
    return {name: torch.argsort(p) for name, p in permutations.items()}


def permute(symmetry: Symmetry, permutations: Permutations, weights: Weights) -> dict[str, Tensor]:
    """Moves units to the places that `permutations` (units,) give them; values are copied bitwise, the function stays.

    Groups that `permutations` leaves out stay as they are. Raises ValueError for an unknown group, for something that
    is no permutation of a group, and for weights that do not fit the symmetry.
    """
    check_weights(symmetry, weights, "weights")
    moving = element(symmetry, permutations)
    return {name: move(symmetry, moving, name, tensor) for name, tensor in weights.items()}


def check_weights(symmetry: Symmetry, weights: Weights, what: str) -> None:
    """Raises ValueError unless the weights have the names and shapes that the symmetry was derived for."""
    if weights.keys() != symmetry.axes.keys():
        odd = sorted(weights.keys() ^ symmetry.axes.keys())[:3]
        raise ValueError(f"{what}: names differ from the symmetry's at {odd}; take them from the same model")
    for name, axes in symmetry.axes.items():
        shape = tuple(axis.group.shape[-1] for axis in axes)
        if tuple(weights[name].shape) != shape:
            raise ValueError(
                f"{what}: {name!r} has shape {tuple(weights[name].shape)}, the symmetry was derived for {shape}; "
                "derive it again from a model of this architecture"
            )


@dataclass(frozen=True, eq=False)
class Element:
    """The permutations of all groups as one: group k's units are numbered from `starts[k]`."""

    whole: Ids
    starts: Ids


def element(symmetry: Symmetry, permutations: Permutations) -> Element:
    """Puts permutations (units,) into one array; raises ValueError for what is no element of the symmetry."""
    for name in permutations:
        checks.choice("permutations", name, symmetry.groups)
    starts = np.cumsum([0, *(g.units for g in symmetry.groups.values())])
    whole = np.arange(starts[-1])
    for k, (name, group) in enumerate(symmetry.groups.items()):
        p = permutations[name].cpu().numpy() if name in permutations else np.arange(group.units)
        if p.shape != (group.units,) or not np.array_equal(np.sort(p), np.arange(group.units)):
            raise ValueError(
                f"permutations: {name!r} must hold every number below {group.units} once; got {p.tolist()[:8]} ..."
            )
        outer = permutations.get(group.within or "")
        blocks = np.arange(group.blocks) if outer is None else outer.cpu().numpy()
        if not np.array_equal(p // group.size, np.repeat(blocks, group.size)):
            raise ValueError(f"permutations: {name!r} must move in blocks of {group.size}, as {group.within!r} does")
        whole[starts[k] : starts[k + 1]] = starts[k] + p
    return Element(whole, starts)


def move(symmetry: Symmetry, element: Element, name: str, tensor: Tensor, but: int | None = None) -> Tensor:
    """Moves what lies on the axes of one weight, all of them or all `but` one; the shape (any) stays."""
    out = tensor
    for dim, axis in enumerate(symmetry.axes[name]):
        source = None if dim == but else _sources(axis, element)
        if source is None:
            continue
        index = torch.from_numpy(source).to(tensor.device)
        if index.ndim == 1:
            out = out.index_select(dim, index)
        else:  # the inputs of a grouped convolution: each group of rows has an order of its own
            rows = index.repeat_interleave(len(out) // len(index), 0)
            out = out.take_along_dim(rows.reshape(*rows.shape, *(1,) * (out.ndim - 2)), 1)
    return out.clone() if out is tensor else out


def _sources(axis: Axis, element: Element) -> Ids | None:
    """For every position of an axis, the position whose content comes there; None if all stand still."""
    group, index, lane = axis.group.ravel(), axis.index.ravel(), axis.lane.ravel()
    live = np.flatnonzero(group >= 0)
    unit = element.starts[group[live]] + index[live]
    if np.array_equal(element.whole[unit], unit):
        return None
    have, want = (lane[live] * len(element.whole) + u for u in (unit, element.whole[unit]))
    order = np.argsort(have)
    source = np.arange(len(group))
    source[live] = live[order[np.searchsorted(have[order], want)]]
    return source.reshape(axis.group.shape) % axis.group.shape[-1]

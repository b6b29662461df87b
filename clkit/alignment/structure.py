"""The permutation symmetry of any model, derived from its graph, as plain data.

Every axis of every weight starts as points that may be permuted freely. One walk through the model's graph ties
together what must move together (`rules`), pins what must not move, and what is left is the symmetry: groups of
units, the axes they lie on, and, for what does not move, the operation that is to blame. Inputs and outputs of the
model are pinned, so every element of the symmetry keeps the function.
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from clkit.alignment.permutation import permute, random_permutations
from clkit.alignment.points import Ids
from clkit.alignment.program import Program, mode
from clkit.alignment.taps import Tap
from clkit.weights import live_tensors


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
                [t for t in tree_leaves(torch.func.functional_call(net, w, args)) if isinstance(t, Tensor)]
                for w in (weights, moved)
            )
        change = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True))
        return Proof(change, change < tolerance, self.share, len(self.groups), self.frozen)

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
                for g in (g for g in dict.fromkeys(axis.group.tolist()) if g >= 0):
                    slots = np.flatnonzero(axis.group == g)
                    slots = slots[np.lexsort((axis.index[slots], axis.lane[slots]))]
                    found[names[g]].append((weight, dim, slots.reshape(-1, self.groups[names[g]].units)))
        return found

    def _words(self, axis: Axis, names: list[str]) -> str:
        group, words = axis.group.ravel(), []
        for g in dict.fromkeys(group.tolist()):
            here = group == g
            if g < 0:
                reasons = dict.fromkeys(self.reasons[r] for r in axis.reason.ravel()[here])
                words.append(f"fixed ({', '.join(list(reasons)[:2])})")
                continue
            units, times = np.unique(axis.index.ravel()[here], return_counts=True)
            part = (
                "" if len(units) == self.groups[names[g]].units else f"[{len(units)} of {self.groups[names[g]].units}]"
            )
            words.append(names[g] + part + (f" x {times[0]}" if times[0] > 1 else ""))
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

"""Groups of units, the axes of weights that the units lie on, and elements: permutations of units, and of weights."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clkit import checks
from clkit.symmetry.points import Ids


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


Permutations = Mapping[str, Tensor]
"""For each group, which unit comes to each place: place i takes what was at `permutations[group][i]`."""


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


@dataclass(frozen=True, eq=False)
class Element:
    """The permutations of all groups as one: group k's units are numbered from `starts[k]`."""

    whole: Ids
    starts: Ids

    @classmethod
    def of(cls, groups: Mapping[str, Group], permutations: Permutations) -> "Element":
        """Puts permutations (units,) into one array; raises ValueError for what is no element of the symmetry."""
        for name in permutations:
            checks.choice("permutations", name, groups)
        starts = np.cumsum([0, *(g.units for g in groups.values())])
        whole = np.arange(starts[-1])
        for k, (name, group) in enumerate(groups.items()):
            p = permutations[name].cpu().numpy() if name in permutations else np.arange(group.units)
            if p.shape != (group.units,) or not np.array_equal(np.sort(p), np.arange(group.units)):
                raise ValueError(
                    f"permutations: {name!r} must hold every number below {group.units} once; got {p.tolist()[:8]} ..."
                )
            outer = permutations.get(group.within or "")
            blocks = np.arange(group.blocks) if outer is None else outer.cpu().numpy()
            if not np.array_equal(p // group.size, np.repeat(blocks, group.size)):
                raise ValueError(
                    f"permutations: {name!r} must move in blocks of {group.size}, as {group.within!r} does"
                )
            whole[starts[k] : starts[k + 1]] = starts[k] + p
        return cls(whole, starts)

    def move(self, axes: tuple[Axis, ...], tensor: Tensor, but: int | None = None) -> Tensor:
        """Moves what lies on the axes of one weight, all of them or all `but` one; the shape (any) stays."""
        out = tensor
        for dim, axis in enumerate(axes):
            taken = None if dim == but else self._taken(axis)
            if taken is None:
                continue
            index = torch.from_numpy(taken).to(tensor.device)
            if index.ndim == 1:
                out = out.index_select(dim, index)
            else:  # the inputs of a grouped convolution: each group of rows has an order of its own
                rows = index.repeat_interleave(len(out) // len(index), 0)
                out = out.take_along_dim(rows.reshape(*rows.shape, *(1,) * (out.ndim - 2)), 1)
        return out.clone() if out is tensor else out

    def _taken(self, axis: Axis) -> Ids | None:
        """For every position of an axis, the position whose content comes there; None if all stand still."""
        group, index, lane = axis.group.ravel(), axis.index.ravel(), axis.lane.ravel()
        live = np.flatnonzero(group >= 0)
        unit = self.starts[group[live]] + index[live]
        if np.array_equal(self.whole[unit], unit):
            return None
        have, want = (lane[live] * len(self.whole) + u for u in (unit, self.whole[unit]))
        order = np.argsort(have)
        source = np.arange(len(group))
        source[live] = live[order[np.searchsorted(have[order], want)]]
        return source.reshape(axis.group.shape) % axis.group.shape[-1]

"""The permutation symmetry of any model, derived from its graph, as plain data.

Every axis of every weight starts as points that may be permuted freely. One walk through the model's graph ties
together what must move together (`rules`), pins what must not move, and what is left is the symmetry: groups of
units, the axes they lie on, and, for what does not move, the operation that is to blame. Inputs and outputs of the
model are pinned, so every element of the symmetry keeps the function.
"""

import operator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from clkit.alignment.labels import Factor, Label, Part, drop, fixed
from clkit.alignment.points import Cells, Ids, Points
from clkit.alignment.program import Program, base_name, trace, writes
from clkit.alignment.rules import Call, propagate
from clkit.alignment.taps import Tap, find_taps
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


class Table(list[Row]):
    """Rows that print as a table."""

    def __str__(self) -> str:
        cells = [("parameter", "axis", "size", "follows")]
        cells += [(r.parameter, str(r.axis), str(r.size), r.follows) for r in self]
        widths = [max(len(c[k]) for c in cells) for k in range(3)]
        return "\n".join(
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in cells
        )


@dataclass(frozen=True, eq=False, repr=False)
class Symmetry:
    """Which axes of which weights may be permuted together without a change of the function."""

    groups: dict[str, Group]
    axes: dict[str, tuple[Axis, ...]]
    reasons: tuple[str, ...]
    buffers: frozenset[str]
    taps: tuple[Tap, ...] = field(repr=False)
    program: Program = field(repr=False)

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
        """One row for each axis of each weight: `r` is a whole group, `r[:5]` part of it, `|` puts one after another."""
        names = list(self.groups)
        return Table(
            Row(name, k, axis.group.shape[-1], self._words(axis, names))
            for name, axes in self.axes.items()
            for k, axis in enumerate(axes)
        )

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
            part = "" if len(units) == self.groups[names[g]].units else f"[{len(units)} of {self.groups[names[g]].units}]"
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


def symmetry(model: nn.Module, example: Any) -> Symmetry:
    """Derives the permutation symmetry of a model from its graph on an example input (a tensor or a tuple).

    Raises ValueError for a model that `torch.export` cannot follow. An operation that is not understood pins the
    axes that meet it and is named in `Symmetry.frozen`.
    """
    program = trace(model, example)
    shapes = {name: tuple(t.shape) for name, t in live_tensors(model).items()}
    walk = Walk(program, shapes)
    return _read(program, walk)


class Walk:
    """One walk through a graph: afterwards `weights` and `values` hold labels over `points`."""

    def __init__(self, program: Program, shapes: dict[str, tuple[int, ...]]) -> None:
        self.points = Points()
        self.fibres = {name: self.points.fresh(*shape) for name, shape in _fibres(program, shapes).items()}
        self.weights = {name: self._weight(name, shape) for name, shape in shapes.items()}
        self.values: dict[Node, Any] = {}
        self.constants: dict[Label, Ids] = {}
        current: dict[Node, Any] = {}  # in-place operations change what a node stands for
        for node in program.module.graph.nodes:
            if node.op == "output":
                for label in tree_leaves(torch.fx.map_arg(node.args, current.__getitem__)):
                    if isinstance(label, Label):
                        drop(self.points, label, label.parts, "output")
                break
            current[node] = self.values[node] = self._label(program, node, current)
            if writes(node):
                current[node.args[0]] = current[node]

    def _weight(self, name: str, shape: tuple[int, ...]) -> Label:
        dims = [(Factor(n),) if n > 1 else () for n in shape]
        if name in self.fibres:
            dims[1] = (Factor(shape[1], "group of a convolution"),)
        live = [row[0] for k, row in enumerate(dims) if row and not (k == 1 and name in self.fibres)]
        return Label(tuple(dims), tuple(Part(self.points.fresh(f.size), (f,)) for f in live))

    def _label(self, program: Program, node: Node, current: dict[Node, Any]) -> Any:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in program.sources:
            return self.weights[program.sources[node.name]]
        if node.op == "placeholder" and node.name in program.constants:
            label = fixed(tuple(program.constants[node.name].shape), "constant")
            if not program.constants[node.name].is_floating_point():
                self.constants[label] = program.constants[node.name].cpu().numpy()
            return label
        if node.op == "placeholder":
            return tree_map(lambda shape: fixed(shape, "input"), _shapes(value), is_leaf=_is_shape)
        if node.target is operator.getitem:
            return current[node.args[0]][node.args[1]]
        if node.op != "call_function" or not any(map(_is_shape, tree_leaves(_shapes(value), is_leaf=_is_shape))):
            return None
        arguments = _bind(node, current)
        weight = node.args[1] if base_name(node).startswith("conv") else None
        fibre = self.fibres.get(program.sources.get(getattr(weight, "name", ""), ""))
        why = f"{base_name(node)} ({node.name})"
        result = propagate(Call(self.points, why, _shapes(value), arguments, self.constants, fibre), node.target)
        if base_name(node) in ("lift_fresh_copy", "detach", "clone", "alias"):
            kept = arguments.get("self")
            if kept in self.constants:
                self.constants[result] = self.constants[kept]
        return result


def _bind(node: Node, current: dict[Node, Any]) -> dict[str, Any]:
    args, kwargs = torch.fx.map_arg(
        (node.args, dict(node.kwargs)), lambda n: label if (label := current[n]) is not None else _number(n)
    )
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(k): a for k, a in enumerate(args)} | kwargs
    schema = node.target._schema.arguments
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    return bound | dict(zip((a.name for a in schema), args, strict=False)) | kwargs


def _number(node: Node) -> Any:
    value = node.meta.get("val")
    return value.node.hint if isinstance(value, torch.SymInt) else value


def _shapes(value: Any) -> Any:
    """Sizes in place of tensors; of a size that depends on the batch, the example's."""
    if isinstance(value, Tensor):
        return torch.Size(n if isinstance(n, int) else n.node.hint for n in value.shape)
    return [_shapes(v) for v in value] if isinstance(value, (tuple, list)) else None


def _is_shape(value: Any) -> bool:
    return isinstance(value, torch.Size)


def _fibres(program: Program, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """The weights that are used by grouped convolutions only: their groups and inputs of a group."""
    uses: dict[str, set[int]] = {}
    for node in program.module.graph.nodes:
        for used in node.all_input_nodes:
            if used.name in program.sources:
                arguments = _bind(node, dict.fromkeys(node.all_input_nodes)) if node.op == "call_function" else {}
                plain = base_name(node) in ("conv1d", "conv2d", "conv3d") and node.args[1] is used
                uses.setdefault(program.sources[used.name], set()).add(arguments["groups"] if plain else 1)
    return {
        name: (groups.copy().pop(), shapes[name][1])
        for name, groups in uses.items()
        if len(groups) == 1 and groups != {1} and shapes[name][1] > 1
    }


def _read(program: Program, walk: Walk) -> Symmetry:
    """Turns the finished points into groups, axes and taps."""
    cells = walk.points.finish()
    found = _follow(cells)
    lane = np.unique(np.stack([cells.column, cells.cell]), axis=1, return_inverse=True)[1].ravel()
    reasons, reason = _blame(cells, found.group)
    places = {}
    for name, label in walk.weights.items():
        arrays = [row and label.part(row[0]) for row in label.dims]
        places[name] = [part.points if part else np.full(n, -1) for part, n in zip(arrays, label.shape, strict=True)]
        if name in walk.fibres:
            places[name][1] = walk.fibres[name]
    names = _names(places, found)
    number = np.full(int(found.group.max(initial=-1)) + 2, -1)
    number[list(names)] = np.arange(len(names))
    axes = {}
    for name, arrays in places.items():
        axes[name] = tuple(
            Axis(number[found.group[p]], found.index[p], lane[p], reason[p]) if p.min(initial=0) >= 0
            else Axis(p, p, np.zeros_like(p), np.zeros_like(p))
            for p in arrays
        )
    groups = {}
    for g, name in names.items():
        outer = int(found.within[g])
        blocks = int(found.units[outer]) if outer >= 0 else 1
        groups[name] = Group(name, int(found.units[g]) // blocks, names.get(outer), blocks)
    taps = find_taps(program, walk.values, found.group, found.index, lane, names)
    return Symmetry(groups, axes, reasons, program.buffers, taps, program)


@dataclass(frozen=True, eq=False)
class _Found:
    """Which group (-1: none) and which of its units every point follows; for groups, that around it, its units."""

    group: Ids
    index: Ids
    within: Ids
    units: Ids


def _follow(cells: Cells) -> _Found:
    """Numbers the units of every group, block by block; one alone in its block follows the block."""
    n = len(cells.unit)
    group, index = np.full(n, -1), np.full(n, -1)
    within, units = np.full(n + 1, -1), np.zeros(n + 1, np.int64)
    level = np.unique(cells.unit[cells.block < 0])
    while len(level):
        block, cell = cells.block[level], cells.cell[level]
        place = np.where(block >= 0, index[block], -1)
        order = np.lexsort((level, block, place, cell))
        level, block, cell = level[order], block[order], cell[order]
        pairs = np.unique(np.stack([cell, block]), axis=1, return_inverse=True, return_counts=True)
        free = pairs[2][pairs[1].ravel()] > 1
        follows = ~free & (block >= 0)
        group[level[follows]], index[level[follows]] = group[block[follows]], index[block[follows]]
        level_free, cell_free, block_free = level[free], cell[free], block[free]
        _, starts, counts = np.unique(cell_free, return_index=True, return_counts=True)
        group[level_free] = cell_free
        index[level_free] = np.arange(len(level_free)) - np.repeat(starts, counts)
        within[cell_free] = np.where(block_free >= 0, group[block_free], -1)
        units[cell_free] = np.repeat(counts, counts)
        level = np.unique(cells.unit[np.isin(cells.block, level)])
    return _Found(group[cells.unit], index[cells.unit], within, units)


def _blame(cells: Cells, group: Ids) -> tuple[tuple[str, ...], Ids]:
    """For every point that stands still, the number of a reason: its own, or of its members if it is a block."""
    why = np.zeros(len(cells.unit), np.int64)
    named = np.flatnonzero(cells.why)[::-1]
    why[cells.unit[named]] = cells.why[named]
    for _ in range(3):
        inner = np.flatnonzero((cells.block >= 0) & (why[cells.unit] > 0))
        outer = cells.block[inner]
        why[outer] = np.where(why[outer] > 0, why[outer], why[cells.unit[inner]])
    alone = len(cells.reasons)
    why = np.where(why > 0, why, alone)[cells.unit]
    return (*cells.reasons, "no other has its role"), np.where(group < 0, why, 0)


def _names(places: dict[str, list[Ids]], found: _Found) -> dict[int, str]:
    """Names groups after the module on whose weights they appear first, blocks after what is in them."""
    names: dict[int, str] = {}
    for name, arrays in places.items():
        stem = name.rpartition(".")[0] or name
        for g in (g for p in arrays if p.min(initial=0) >= 0 for g in dict.fromkeys(found.group[p].ravel().tolist())):
            chain, end = [], ""
            while g >= 0 and g not in names:
                chain.append((g, end))
                g, end = int(found.within[g]), end + ".blocks"
            for g, end in reversed(chain):
                same = sum(n == stem + end or n.startswith(stem + end + "#") for n in names.values())
                names[g] = f"{stem}{end}#{same + 1}" if same else stem + end
    return names

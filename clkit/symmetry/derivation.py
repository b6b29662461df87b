"""Deriving a symmetry: one walk through a model's graph ties and pins points, and what is left is the symmetry."""

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from clkit import checks
from clkit.modules import unwrapped
from clkit.store import describe, digest
from clkit.symmetry.elements import Axis, Group
from clkit.symmetry.labels import Factor, Label, Span, drop, fixed
from clkit.symmetry.moving import Call, is_shape
from clkit.symmetry.points import Ids, Orbits, Points
from clkit.symmetry.program import Program, arguments, base_name, single, trace
from clkit.symmetry.rules import propagate
from clkit.symmetry.structure import Symmetry, Tap, slots_of
from clkit.weights import live_tensors

READERS = frozenset("_cdist_forward addmm bmm convolution mm scaled_dot_product_attention".split())
PASSED = frozenset(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d alias clone constant_pad_nd expand "
    "getitem index mean native_dropout permute select slice split_with_sizes squeeze unsqueeze view".split()
)


@checks.arguments
def symmetry(model: nn.Module, example: Any) -> Symmetry:
    """Derives the permutation symmetry of a model from its graph on an example input.

    The example is a tensor, a tuple of all arguments, or a mapping of arguments by name (what a tokenizer gives). A
    list is one argument. None, numbers, strings and nested containers may be among them, and hold as they are.
    An operation that is not understood pins the axes that meet it and is named in `Symmetry.frozen`. Weights that the
    model does not use in evaluation (auxiliary heads) follow its graph in training. Raises ValueError for a model
    that `torch.export` cannot follow, for one with a shape that depends on the values of its inputs, and for an
    example without elements.

    A model and an example that are in all as they were at the last call get the same answer at once: values, code,
    attributes, hooks and modes. What an installed package defines is taken to stay, but for the modules' forward.
    """
    forwards = [type(module).forward for module in model.modules()]
    try:
        key, held = digest(describe([model, forwards, example, torch.get_default_dtype()])), _FOUND.get(model)
    except TypeError:  # something in it cannot be told apart
        return _symmetry(unwrapped(model), example)
    if held is None or held[0] != key:
        held = _FOUND[model] = key, _symmetry(unwrapped(model), example)
    return held[1]


_FOUND: WeakKeyDictionary[nn.Module, tuple[str, Symmetry]] = WeakKeyDictionary()


def _symmetry(model: nn.Module, example: Any) -> Symmetry:
    program = trace(model, example)
    programs = [program]
    if program.batch is None and single(arguments(example)):  # a model may tell a batch of one from others
        programs.append(trace(model, example, once=True))
    if live_tensors(model).keys() - program.used:
        with suppress(ValueError):  # evaluation works and training does not: what only that uses is pinned
            return _derived([*programs, trace(model, example, training=True)], model, example)
    return _derived(programs, model, example)


def _derived(programs: list[Program], model: nn.Module, example: Any) -> Symmetry:
    """What the graphs leave of the symmetry; weights that no graph uses, or that share memory, stand still."""
    walk = Walk(programs, {name: tuple(t.shape) for name, t in live_tensors(model).items()})
    idle = walk.axes.keys() - {name for program in programs for name in program.used}
    for name, why in (dict.fromkeys(idle, "not used") | dict.fromkeys(_overlapping(model), "shared memory")).items():
        for points in walk.axes[name]:
            walk.points.pin(points[points >= 0], why)
    return _read(programs[0], walk, example)


LARGE = 1 << 20  # constants of more elements are not computed


class Walk:
    """A walk through graphs: afterwards `weights`, and `values` of the first graph, hold labels over `points`."""

    def __init__(self, programs: list[Program], shapes: dict[str, tuple[int, ...]]) -> None:
        self.points = Points()
        self.fibres = {name: self.points.fresh(*shape) for name, shape in _fibres(programs, shapes).items()}
        self.axes: dict[str, list[Ids]] = {}  # the points on each axis of the weights, -1 for an axis of one index
        self.weights = {name: self._weight(name, shape) for name, shape in shapes.items()}
        self.known: dict[Label, Tensor] = {}
        self.picked: dict[Any, int] = {}  # how many a constant mask picks, for the symbol of that size
        self.values, *_ = [self._walk(program) for program in programs]

    def _walk(self, program: Program) -> dict[Node, Any]:
        values: dict[Node, Any] = {}
        *nodes, output = program.module.graph.nodes
        for node in nodes:
            values[node] = self._label(program, node, values)
        for label in (r for node in output.all_input_nodes for r in tree_leaves(values[node]) if isinstance(r, Label)):
            drop(self.points, label, label.spans, "output")
        return values

    def _weight(self, name: str, shape: tuple[int, ...]) -> Label:
        """New points for every axis; the inputs of a grouped convolution are known by its groups as well: fibres."""
        axes = self.axes[name] = []
        for k, n in enumerate(shape):
            fibres = self.fibres.get(name) if k == 1 else None
            axes.append(np.full(n, -1) if n < 2 else self.points.fresh(n) if fibres is None else fibres)
        whys = ["" if axis.ndim == 1 else "group of a convolution" for axis in axes]
        dims = tuple((Factor(n, why),) if n > 1 else () for n, why in zip(shape, whys, strict=True))
        spans = (Span(axis, row) for axis, row in zip(axes, dims, strict=True) if row and axis.ndim == 1)
        return Label(dims, tuple(spans))

    def _label(self, program: Program, node: Node, values: dict[Node, Any]) -> Any:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in program.sources:
            return self.weights[program.sources[node.name]]
        if node.op == "placeholder" and node.name in program.constants:
            return self._constant(program.constants[node.name])
        if node.op == "placeholder":
            return tree_map(lambda shape: fixed(shape, "input"), self._shapes(value), is_leaf=is_shape)
        if node.target is operator.getitem:
            return values[node.all_input_nodes[0]][node.args[1]]
        if node.op == "call_function" and (constant := self._computed(node, values)) is not None:
            return self._constant(constant)
        shapes = self._shapes(value)
        if node.op != "call_function" or not any(map(is_shape, tree_leaves(shapes, is_leaf=is_shape))):
            return None
        arguments = self._bind(node, values)
        weight = node.args[1] if base_name(node) == "convolution" else None
        fibre = self.fibres.get(program.sources.get(getattr(weight, "name", ""), ""))
        why = f"{base_name(node).strip('_')} ({node.name})"
        return propagate(Call(node, self.points, why, shapes, arguments, self.known, fibre))

    def _constant(self, value: Tensor) -> Label:
        """Fixed along the axes that a known tensor varies along."""
        value = value.detach().cpu()
        firsts = [value.narrow(d, 0, 1) if n > 1 else value for d, n in enumerate(value.shape)]
        signs = (lambda t: t) if value.is_complex() else torch.signbit  # 0 and -0 are equal, and differ
        varies = [not bool(((value == one) & (signs(value) == signs(one))).all()) for one in firsts]
        dims = tuple(
            (Factor(n, "constant" if v else ""),) if n != 1 else () for n, v in zip(value.shape, varies, strict=True)
        )
        label = Label(dims)
        self.known[label] = value
        return label

    def _computed(self, node: Node, values: dict[Node, Any]) -> Tensor | None:
        """The value of an operation on constants alone; what a constant mask picks has a size that is known then."""
        known = {n: self.known[values[n]] for n in node.all_input_nodes if values[n] in self.known}
        shape = getattr(node.meta.get("val"), "shape", ())
        if base_name(node) == "index":
            mask = next((t for t in known.values() if t.dtype == torch.bool), None)
            self._count(shape, [int(mask.sum())] * len(shape) if mask is not None else [])
        large = all(isinstance(n, int) for n in shape) and prod(shape) > LARGE
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if len(known) < len(node.all_input_nodes) or large or random or base_name(node).startswith(("empty", "copy_")):
            return None
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), known.get)
        operation: Any = node.target
        value = operation(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))
        if not isinstance(value, Tensor):
            return None
        self._count(shape, value.shape)
        return value

    def _count(self, shape: Sequence[Any], sizes: Sequence[int]) -> None:
        for n, size in zip(shape, sizes, strict=False):
            if isinstance(n, torch.SymInt) and n.node.hint is None:
                self.picked[n.node.expr] = size

    def _bind(self, node: Node, values: Mapping[Node, Any]) -> dict[str, Any]:
        def given(n: Node) -> Any:
            number = self._size(n.meta["val"]) if isinstance(n.meta.get("val"), torch.SymInt) else n.meta.get("val")
            return number if values[n] is None else values[n]

        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), given)
        if not isinstance(node.target, torch._ops.OpOverload):
            return {str(k): a for k, a in enumerate(args)} | kwargs
        schema = node.target._schema.arguments
        bound = {a.name: a.default_value for a in schema if a.has_default_value()}
        return bound | dict(zip((a.name for a in schema), args, strict=False)) | kwargs

    def _shapes(self, value: Any) -> Any:
        """Sizes in place of tensors; of a size that depends on the batch, the example's."""
        if isinstance(value, Tensor):
            return torch.Size(map(self._size, value.shape))
        return [self._shapes(v) for v in value] if isinstance(value, (tuple, list)) else None

    def _size(self, n: Any) -> int:
        if not isinstance(n, torch.SymInt):
            return n
        expression: Any = n.node.expr.xreplace(self.picked) if n.node.hint is None else n.node.hint
        try:
            return int(expression)
        except TypeError as error:
            raise ValueError(
                "model: the shape of a value in its graph depends on the values of the input; align the part of the "
                "model before it"
            ) from error


def _overlapping(model: nn.Module) -> list[str]:
    """Weights that share memory with another one that is not the same, such as a transposed view or a part of it."""
    spots = []
    for name, t in live_tensors(model).items():
        reach = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        spots.append((t.data_ptr(), t.data_ptr() + reach * t.element_size(), name))
    return [name for low, high, name in spots if any(a < high and low < b and other != name for a, b, other in spots)]


def _fibres(programs: list[Program], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """The weights that are used by grouped convolutions only: their groups and inputs of a group."""
    uses: dict[str, set[int]] = {}
    for program, node in ((p, node) for p in programs for node in p.module.graph.nodes):
        for used in (n for n in node.all_input_nodes if n.name in program.sources):
            groups = node.args[8] if base_name(node) == "convolution" and node.args[1] is used else 1
            uses.setdefault(program.sources[used.name], set()).add(groups)
    return {
        name: (groups.copy().pop(), shapes[name][1])
        for name, groups in uses.items()
        if len(groups) == 1 and groups != {1} and shapes[name][1] > 1
    }


def _read(program: Program, walk: Walk, example: Any) -> Symmetry:
    """Turns the finished points into groups, axes and taps; arrays have an entry more, for what is no point."""
    orbits = walk.points.finish()
    found = _follow(orbits)
    lane = np.unique(np.stack([orbits.colour, orbits.orbit]), axis=1, return_inverse=True)[1].ravel()
    lane = np.append(lane, 0)
    reasons, reason = _blame(orbits, found.group)
    names = _names(walk.axes, found)
    number = np.full(int(found.group.max(initial=-1)) + 2, -1)
    number[list(names)] = np.arange(len(names))
    axes = {
        name: tuple(Axis(number[found.group[p]], found.index[p], lane[p], reason[p]) for p in places)
        for name, places in walk.axes.items()
    }
    groups = {}
    for g, name in names.items():
        outer = int(found.within[g])
        blocks = int(found.counts[outer]) if outer >= 0 else 1
        groups[name] = Group(name, int(found.counts[g]) // blocks, names.get(outer), blocks)

    def slots(points: Ids) -> dict[str, Ids]:
        rows = slots_of(found.group[points], found.index[points], lane[points])
        return {names[g]: positions for g, positions in rows.items() if g in names}

    taps = _taps(program, walk.values, slots)
    return Symmetry(groups, axes, reasons, program.buffers, taps, program, example)


@dataclass(frozen=True, eq=False)
class _Found:
    """Which group (-1: none) and which of its units every point follows; by group, that around it, how many units."""

    group: Ids
    index: Ids
    within: Ids
    counts: Ids


def _follow(orbits: Orbits) -> _Found:
    """Numbers the units of every group, block by block; one alone in its block follows the block."""
    n = len(orbits.unit)
    group, index = np.full(n, -1), np.full(n, -1)
    within, units = np.full(n + 1, -1), np.zeros(n + 1, np.int64)
    level = np.unique(orbits.unit[orbits.block < 0])
    while len(level):
        block, orbit = orbits.block[level], orbits.orbit[level]
        place = np.where(block >= 0, index[block], -1)
        order = np.lexsort((level, block, place, orbit))
        level, block, orbit = level[order], block[order], orbit[order]
        pairs = np.unique(np.stack([orbit, block]), axis=1, return_inverse=True, return_counts=True)
        free = pairs[2][pairs[1].ravel()] > 1
        follows = ~free & (block >= 0)
        group[level[follows]], index[level[follows]] = group[block[follows]], index[block[follows]]
        level_free, orbit_free, block_free = level[free], orbit[free], block[free]
        _, starts, counts = np.unique(orbit_free, return_index=True, return_counts=True)
        group[level_free] = orbit_free
        index[level_free] = np.arange(len(level_free)) - np.repeat(starts, counts)
        within[orbit_free] = np.where(block_free >= 0, group[block_free], -1)
        units[orbit_free] = np.repeat(counts, counts)
        level = np.unique(orbits.unit[np.isin(orbits.block, level)])
    return _Found(np.append(group[orbits.unit], -1), np.append(index[orbits.unit], -1), within, units)


def _blame(orbits: Orbits, group: Ids) -> tuple[tuple[str, ...], Ids]:
    """For every point that stands still, the number of a reason: its own, or of its members if it is a block."""
    why = np.zeros(len(orbits.unit), np.int64)
    named = np.flatnonzero(orbits.why)[::-1]
    why[orbits.unit[named]] = orbits.why[named]
    for _ in range(3):
        inner = np.flatnonzero((orbits.block >= 0) & (why[orbits.unit] > 0))
        outer = orbits.block[inner]
        why[outer] = np.where(why[outer] > 0, why[outer], why[orbits.unit[inner]])
    last = len(orbits.reasons)
    why = np.where(why > 0, why, last)[orbits.unit]
    return (*orbits.reasons, "no other has its role"), np.append(np.where(group[:-1] < 0, why, 0), 0)


def _names(places: dict[str, list[Ids]], found: _Found) -> dict[int, str]:
    """Names groups after the module on whose weights they appear first, blocks after what is in them."""
    names: dict[int, str] = {}
    for name, arrays in places.items():
        stem = name.rpartition(".")[0] or name
        for g in (g for p in arrays for g in dict.fromkeys(found.group[p].ravel().tolist())):
            chain, end = [], ""
            while g >= 0 and g not in names:
                chain.append((g, end))
                g, end = int(found.within[g]), end + ".blocks"
            for g, end in reversed(chain):
                same = sum(n == stem + end or n.startswith(stem + end + "#") for n in names.values())
                names[g] = f"{stem}{end}#{same + 1}" if same else stem + end
    return names


def _taps(program: Program, values: Mapping[Node, Any], slots: Callable[[Ids], dict[str, Ids]]) -> tuple[Tap, ...]:
    """The values that convolutions, linear layers and attention read, traced back through pooling and views.

    A residual stream is read once a block and all its readings count. Two kinds of values count only for groups that
    show nowhere else: those that do not depend on the model's input (a hidden layer that makes position biases), and
    then those that depend on it but that none of these operations reads.
    """
    nodes = list(program.module.graph.nodes)
    driven = {n for n in nodes if n.name in program.inputs}
    for node in nodes:
        if not driven.isdisjoint(node.all_input_nodes):
            driven.add(node)
    readers = [n for n in nodes if n.op == "call_function" and base_name(n) in READERS]
    read = dict.fromkeys(_origin(source, values) for reader in readers for source in reader.all_input_nodes)
    shown: set[str] = set()
    taps: list[Tap] = []
    rest = [n for n in nodes if n not in read and n in driven]
    for some in ([n for n in read if n in driven], [n for n in read if n not in driven], rest):
        new = []
        for node in some:
            if node.op != "call_function" or not isinstance(label := values[node], Label):
                continue
            moving = [(span, rows) for span in label.spans if (rows := slots(span.points.ravel()))]
            sizes, places = _split(label, [span for span, _ in moving])
            for k, (_, rows) in enumerate(moving):
                others = {d: tuple(other) for j, (_, other) in enumerate(moving) if j != k for d in places[j]}
                own = {g: positions for g, positions in rows.items() if g not in shown}
                new.append(Tap(node.name, sizes, places[k], own, others))
        taps += [t for t in new if t.slots]
        shown |= {g for t in new for g in t.slots}
    return tuple(taps)


def _origin(node: Node, values: Mapping[Node, Any]) -> Node:
    """The tensor that a value is taken from by pooling and views."""
    origin = node
    while node.op == "call_function" and base_name(node) in PASSED:
        node = node.all_input_nodes[0]
        origin = node if isinstance(values[node], Label) else origin
    return origin


def _split(label: Label, spans: Sequence[Span]) -> tuple[tuple[tuple[int, ...], ...], list[tuple[int, ...]]]:
    """How a value's dimensions are split so that the factors of spans are dimensions; and which these are, by span."""
    held = {f for span in spans for f in span.factors}
    sizes, places, count = [], {}, 0
    for row in label.dims:
        inside = not held.isdisjoint(row)
        loose = next((k for k, f in enumerate(row) if f not in held), None)
        cuts = tuple(-1 if k == loose else f.size for k, f in enumerate(row))
        sizes.append(cuts if inside and len(row) > 1 else ())
        for f in row if inside else row[:1]:
            places[f] = count
            count += inside
        count += not inside
    return tuple(sizes), [tuple(places[f] for f in span.factors) for span in spans]

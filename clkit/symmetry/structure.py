"""The permutation symmetry of a model as plain data, random elements of it, and how they permute weights.

A symmetry is groups of units, the axes of weights that the units lie on, and, for what does not move, the operation
that is to blame. An element of it is a permutation of the units of each group.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from clkit.modules import called, unwrapped
from clkit.symmetry.elements import Axis, Element, Group, Permutations
from clkit.symmetry.points import Ids
from clkit.symmetry.program import Program, arguments, mode, trace
from clkit.symmetry.report import Row, Table, follows, summary
from clkit.weights import Weights, live_tensors


@dataclass(frozen=True, eq=False)
class Tap:
    """An axis of a value that shows units: of the result of `node`, as operations that mix channels read it.

    Each dimension of the value is split into `sizes` (-1: what is left); the new dimensions `dims`, flattened,
    hold the positions; `slots[group]` has one row of positions, in the order of the group's units, for each lane.
    `others` are the new dimensions that hold other axes of the value which move, with the groups that lie there.
    """

    node: str
    sizes: tuple[tuple[int, ...], ...]
    dims: tuple[int, ...]
    slots: dict[str, Ids]
    others: dict[int, tuple[str, ...]]

    def read(self, value: Tensor) -> Tensor:
        """A view of the value with the dimensions that hold positions in front, and then those of other axes."""
        for dim in reversed(range(len(self.sizes))):
            if self.sizes[dim]:
                value = value.unflatten(dim, self.sizes[dim])
        front = (*self.dims, *self.others)
        return value.movedim(front, tuple(range(len(front))))


def slots_of(group: Ids, index: Ids, lane: Ids) -> dict[int, Ids]:
    """For each group that some positions follow: which ones, a row for each lane, in the order of the group's units."""
    found = {}
    for g in (g for g in dict.fromkeys(group.tolist()) if g >= 0):
        here = np.flatnonzero(group == g)
        here = here[np.lexsort((index[here], lane[here]))]
        found[g] = here.reshape(-1, len(np.unique(index[here])))
    return found


@dataclass(frozen=True)
class Proof:
    """What a random permutation did: the relative change of the output, whether it `holds`, what moved, what not.

    It is the largest over all outputs; where one that has no fractions changes, it is 1.
    """

    change: float
    holds: bool
    share: float
    groups: int
    frozen: dict[str, int]


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
            still = [float((axis.group < 0).mean()) for axis in axes if axis.group.size]
            bound = all(self.reasons[r] == "output" for axis in axes for r in axis.reason.ravel() if r)
            if name not in self.buffers and not (prod(still) == 1 and bound):
                size = prod(axis.group.shape[-1] for axis in axes)
                moved, total = moved + size * (1 - prod(still)), total + size
        return moved / total if total else 0.0

    @property
    def frozen(self) -> dict[str, int]:
        """Why positions on the weights' axes stand still: reason -> how many."""
        counts: Counter[str] = Counter()
        for axis in (axis for axes in self.axes.values() for axis in axes):
            numbers, times = np.unique(axis.reason[axis.reason > 0], return_counts=True)
            counts.update(dict(zip((self.reasons[n] for n in numbers), times.tolist(), strict=True)))
        return dict(counts.most_common())

    def table(self) -> Table:
        """One row for each axis of each weight; `a | b` puts groups one after the other, `a x 4` is one four times."""
        names = list(self.groups)
        return Table(
            Row(name, k, axis.group.shape[-1], follows(axis, names, self.reasons))
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
        Changes are relative to an output's largest finite entry, absolute if that is 0; infinite where numbers become
        infinite or NaN. Raises FloatingPointError if the output holds a NaN to begin with.
        """
        net = copy.deepcopy(unwrapped(model)).to(dtype) if dtype else unwrapped(model)
        weights = live_tensors(net)
        moved = permute(self, random_permutations(self, generator or torch.Generator().manual_seed(0)), weights)

        def outputs(w: Weights) -> list[Tensor]:
            """On copies of the arguments and buffers, into which a forward may write."""
            args, kwargs = tree_map(lambda t: _copy(t, dtype), arguments(self.example if example is None else example))
            own = {name: buffer.clone() for name, buffer in net.named_buffers()}
            own |= {name: tensor.clone() if name in own else tensor for name, tensor in w.items()}
            with mode(net, training=False):
                leaves = tree_leaves(called(net, own, args, kwargs))
            return [torch.as_tensor(leaf) for leaf in leaves if isinstance(leaf, (Tensor, int, float, complex))]

        change = max(map(_change, outputs(weights), outputs(moved)), default=0.0)
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
        a model of several inputs, and for inputs that have not as many dimensions as the example.
        """
        if len(self.program.inputs) != 1:
            raise ValueError(f"model: it takes {len(self.program.inputs)} tensors; only models of one can be watched")
        example = next(t for t in tree_leaves(arguments(self.example)) if isinstance(t, Tensor))
        if inputs.ndim != example.ndim:
            raise ValueError(
                f"inputs: {tuple(inputs.shape)}, but the example was {tuple(example.shape)}; "
                "derive the symmetry from a batch"
            )
        device = next(model.parameters(), inputs).device
        nets = [{name: t.to(device) for name, t in w.items()} for w in nets]
        taps: dict[str, list[Tap]] = {}
        for tap in self.taps:
            taps.setdefault(tap.node, []).append(tap)

        def show(node: str, values: list[Tensor]) -> None:
            for tap in taps.get(node, ()):
                look(tap, values)

        def retraced(x: Tensor) -> Program:
            args, kwargs = tree_map(lambda t: x if t is example else t, arguments(self.example))
            return trace(model, kwargs or args)

        programs: dict[int, Program] = {}
        for x in (part.to(device) for part in inputs.split(batch)):
            if len(x) not in programs:  # the graph may be bound to another batch size or device
                fits = self.program.batch in (None, len(x)) and self.program.device == device
                programs[len(x)] = self.program if fits else retraced(x)
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

        Weights of convolutions in groups of several inputs are left out: what lies on one axis depends on the other.
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

    def __repr__(self) -> str:
        return summary(self.groups, self.share, self.frozen)


def _copy(value: Any, dtype: torch.dtype | None) -> Any:
    """A copy of a tensor, of real or complex numbers in the precision of a dtype; all else as it is."""
    if not isinstance(value, Tensor):
        return value
    if dtype and value.is_complex():
        dtype = dtype.to_complex()
    return value.to(dtype if value.is_floating_point() or value.is_complex() else None, copy=True)


def _change(before: Tensor, after: Tensor) -> float:
    """How much one output changes, relative to its largest finite entry."""
    if before.shape == after.shape and torch.equal(before, after):
        return 0.0
    if before.isnan().any():
        raise FloatingPointError("example: the model's output holds a NaN, so no change can be told; try other inputs")
    if before.shape != after.shape or not (before.is_floating_point() or before.is_complex()):
        return 1.0
    largest = before.abs().nan_to_num(posinf=0.0).max()
    difference = torch.where(before == after, 0.0, (after - before).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(difference.max() / torch.where(largest > 0, largest, 1.0))


def identity(symmetry: Symmetry) -> dict[str, Tensor]:
    """The permutations that leave everything where it is: for each group a tensor (units,) of the numbers in order."""
    return {name: torch.arange(group.units) for name, group in symmetry.groups.items()}


def random_permutations(symmetry: Symmetry, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Draws an element of the symmetry uniformly: blocks change places, and their members within them.

    For each group it gives a tensor (units,), on the CPU.
    """
    drawn: dict[str, Tensor] = {}
    for name, group in symmetry.groups.items():  # blocks come before what is in them
        block = drawn[group.within] if group.within else torch.zeros(1, dtype=torch.int64)
        inner = [torch.randperm(group.size, generator=generator) for _ in range(group.blocks)]
        drawn[name] = (block[:, None] * group.size + torch.stack(inner)).flatten()
    return drawn


def permute(symmetry: Symmetry, permutations: Permutations, weights: Weights) -> dict[str, Tensor]:
    """Moves units to the places that `permutations` (units,) give them; values are copied bitwise, the function stays.

    Groups that `permutations` leaves out stay as they are. Raises ValueError for an unknown group, for something that
    is no permutation of a group, and for weights that do not fit the symmetry.
    """
    check_weights(symmetry, weights, "weights")
    element = Element.of(symmetry.groups, permutations)
    return {name: element.move(symmetry.axes[name], tensor) for name, tensor in weights.items()}


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

"""Where in a model's graph the units of a symmetry can be watched at work."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from clkit.alignment.labels import Label, Part
from clkit.alignment.points import Ids
from clkit.alignment.program import VIEWS, Program, base_name

READERS = frozenset(
    "addmm baddbmm bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution einsum "
    "linear matmul mm scaled_dot_product_attention".split()
)
PASSED = VIEWS | frozenset(
    "_unsafe_view adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d clone constant_pad_nd dropout getitem "
    "index mean pad roll swapaxes".split()
)


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


def find_taps(
    program: Program, values: Mapping[Node, Any], group: Ids, index: Ids, lane: Ids, names: Mapping[int, str]
) -> tuple[Tap, ...]:
    """The values that convolutions, linear layers and attention read, traced back through pooling and views.

    A residual stream is read once a block and all its readings count. Values that do not depend on the model's
    input (a hidden layer that makes position biases) count only for groups that show nowhere else.
    """
    nodes = list(program.module.graph.nodes)
    driven = {n for n in nodes if n.name in program.inputs}
    for node in nodes:
        if not driven.isdisjoint(node.all_input_nodes):
            driven.add(node)
    read: dict[Node, None] = {}
    for node in nodes:
        if node.op == "call_function" and base_name(node) in READERS:
            weight = node.args[1] if base_name(node).startswith(("conv", "linear")) else None
            for source in (n for n in node.all_input_nodes if n is not weight):
                while source.op == "call_function" and base_name(source) in PASSED:
                    source = source.all_input_nodes[0]
                if source.op == "call_function":
                    read[source] = None
    shown: set[str] = set()
    taps: list[Tap] = []
    rest = [n for n in nodes if n.op == "call_function" and n not in read and n in driven]
    for some in ([n for n in read if n in driven], [n for n in read if n not in driven], rest):
        new = []
        for node in some:
            if isinstance(label := values[node], Label):
                new += [tap for part in label.parts if (tap := _tap(node, label, part, group, index, lane, names))]
        new = [Tap(t.node, t.sizes, t.places, {g: s for g, s in t.slots.items() if g not in shown}) for t in new]
        taps += [t for t in new if t.slots]
        shown |= {g for t in new for g in t.slots}
    return tuple(taps)


def _tap(
    node: Node, label: Label, part: Part, group: Ids, index: Ids, lane: Ids, names: Mapping[int, str]
) -> Tap | None:
    sizes, places, count = [], {}, 0
    for row in label.dims:
        inside = any(f in part.factors for f in row)
        sizes.append(tuple(f.size for f in row) if inside and len(row) > 1 else ())
        for f in row if inside else row[:1]:
            places[f] = count
            count += inside
        count += not inside
    for d, (row, split) in enumerate(zip(label.dims, sizes, strict=True)):
        loose = next((k for k, f in enumerate(row) if f not in part.factors), None)
        if split and loose is not None:
            sizes[d] = (*split[:loose], -1, *split[loose + 1 :])
    points = part.points.ravel()
    slots: dict[str, Ids] = {}
    for g in (g for g in dict.fromkeys(group[points].tolist()) if g >= 0):
        here = np.flatnonzero(group[points] == g)
        here = here[np.lexsort((index[points[here]], lane[points[here]]))]
        slots[names[g]] = here.reshape(-1, len(np.unique(index[points[here]])))
    return Tap(node.name, tuple(sizes), tuple(places[f] for f in part.factors), slots) if slots else None

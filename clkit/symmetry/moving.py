"""The table of rules, and those for operations that move elements or work on each by itself.

A rule ties and pins points until the operation commutes with every permutation that is left. It returns the label of
the operation's result, a list where there are several, or `NotImplemented` for a case that it does not understand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from clkit.symmetry.labels import (
    Factor,
    Label,
    cat,
    expand,
    gather,
    join,
    reduce,
    reorder,
    replace,
    reshape,
    settle,
    tidy,
)  # fmt: skip
from clkit.symmetry.points import Ids, Points
from clkit.symmetry.program import base_name


@dataclass(frozen=True, eq=False)
class Call:
    """One operation at work: its node in the graph, where points are tied, and what reports call it.

    `shape` is that of its result, or shapes nested as the result is. `known` are the values of constants.
    """

    node: Node
    points: Points
    why: str
    shape: Any
    arguments: dict[str, Any]
    known: dict[Label, Tensor]
    fibre: Ids | None = None  # for the weight of a grouped convolution: points (groups, inputs of a group)

    @property
    def name(self) -> str:
        """The operation's ATen name."""
        return base_name(self.node)

    @property
    def operation(self) -> Any:
        """What the node calls."""
        return self.node.target

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def labels(self, *names: str) -> list[Label]:
        """The labels among the named arguments."""
        return [a for name in names if isinstance(a := self.arguments.get(name), Label)]

    def dim(self) -> int:
        """The argument `dim`, counted from the front."""
        return self["dim"] % len(self["self"].dims)


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}  # by an operation's ATen name, without its overload


def rule(operations: str) -> Callable[[Rule], Rule]:
    """Enters a function in the table under the names of the operations that it is for."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operations.split(), function))
        return function

    return enter


def is_shape(value: Any) -> bool:
    """Whether it is the shape of one tensor, and not a list of shapes."""
    return isinstance(value, torch.Size)


def reason(label: Label, dims: Sequence[int]) -> str:
    """Why the first fixed factor of some dimensions is."""
    return next((f.why for d in dims for f in label.dims[d] if f.why), "position")


@rule("copy copy_")
def pointwise_rule(call: Call) -> Any:
    """Elementwise, with broadcasting."""
    if not is_shape(call.shape):
        return NotImplemented
    return join(call.points, [a for a in tree_leaves(call.arguments) if isinstance(a, Label)], call.why)


@rule("alias clone lift_fresh_copy _to_copy")
def same_rule(call: Call) -> Label:
    """Each element stays where it is."""
    return call.labels(*call.arguments)[0]


@rule("native_dropout")
def dropout_rule(call: Call) -> list[Label]:
    """Elements stay where they are; what did not vary does now."""
    return [varied(same_rule(call), call.why)] * 2


def varied(label: Label, why: str) -> Label:
    """The label with fixed factors for those that the tensor did not vary along."""
    dims = [[f if f.why or label.span(f) else Factor(f.size, why) for f in row] for row in label.dims]
    return Label(tuple(tuple(row) for row in dims), label.spans)


@rule("full full_like")
def full_rule(call: Call) -> Label:
    """One number everywhere."""
    return expand(Label(((),) * len(call.shape)), call.shape)


@rule("view squeeze unsqueeze")
def reshape_rule(call: Call) -> Any:
    """The same elements in row-major order in another shape."""
    if prod(call.shape) != prod(same_rule(call).shape):
        return NotImplemented  # other elements: the same memory in another type
    return reshape(call.points, same_rule(call), call.shape, call.why)


@rule("expand")
def expand_rule(call: Call) -> Label:
    """Repeats without a copy."""
    return expand(call["self"], call.shape)


@rule("permute")
def permute_rule(call: Call) -> Label:
    """Dimensions in another order."""
    return reorder(call["self"], [d % len(call["self"].dims) for d in call["dims"]])


@rule("slice select split_with_sizes flip")
def take_rule(call: Call) -> Any:
    """Elements at known indices along dimensions."""
    return _take(call, call["self"], call.arguments.get("dims", [call.arguments.get("dim", 0)]))


@rule("repeat")
def repeat_rule(call: Call) -> Any:
    """All dimensions, and new ones in front, one after the other several times."""
    shape = call["self"].shape
    label = expand(call["self"], [1] * (len(call["repeats"]) - len(shape)) + [*shape])
    return _take(call, label, range(len(label.dims)))


def _take(call: Call, label: Label, dims: Sequence[int]) -> Any:
    """The label of what the operation takes along dimensions: it shows the indices on the numbers 0, 1, 2, ..."""
    rank, taken = len(label.dims), [label] * (1 if is_shape(call.shape) else len(call.shape))
    for dim in (d % rank for d in dims):
        numbers = torch.arange(label.shape[dim]).view([-1 if d == dim else 1 for d in range(rank)])
        shown = call.operation(**call.arguments | {"self": numbers})
        for i, moved in enumerate([shown] if isinstance(shown, Tensor) else shown):
            line = tuple(slice(None) if d == dim else 0 for d in range(rank))
            index = moved[line] if moved.ndim == rank else moved.reshape(-1)
            taken[i] = gather(call.points, taken[i], dim, index.numpy(), call.why)
            if moved.ndim < rank:
                taken[i] = reorder(taken[i], [d for d in range(rank) if d != dim])
    return taken[0] if is_shape(call.shape) else taken


@rule("index index_select")
def index_rule(call: Call) -> Any:
    """Indexing by tensors: known numbers take along one dimension; else what is indexed is fixed."""
    label = call["self"]
    indices: list[Any] = call.arguments.get("indices") or [None] * call.dim() + [call["index"]]
    places = [d for d, index in enumerate(indices) if index is not None]
    if len(places) == 1 and (known := call.known.get(indices[places[0]])) is not None:
        if known.dtype != torch.bool or known.ndim == 1:
            index = (known.nonzero() if known.dtype == torch.bool else known).numpy().ravel()
            label = gather(call.points, label, places[0], index % label.shape[places[0]], call.why)
            return reshape(call.points, label, call.shape, call.why)
    label = settle(call.points, label, places, call.why)
    where = join(call.points, [indices[d] for d in places], call.why)
    rest = [row for d, row in enumerate(label.dims) if d not in places]
    at = places[0] if places[-1] - places[0] < len(places) else 0
    out = tidy([*rest[:at], *where.dims, *rest[at:]], (*label.spans, *where.spans))
    return out if out.shape == tuple(call.shape) else NotImplemented


@rule("index_put")
def index_put_rule(call: Call) -> Any:
    """Writes at known places, or where a mask of the same rank says so."""
    label, indices, values = call["self"], call["indices"], call["values"]
    places = [d for d, index in enumerate(indices) if index is not None]
    rank = len(label.dims)
    nodes: Any = call.node.args[1]
    if any(0 in indices[d].shape for d in places):
        return label
    if any(nodes[d].meta["val"].dtype == torch.bool for d in places):
        mask = indices[places[0]]
        if len(places) > 1 or len(values.dims) > 0 or places[0] + len(mask.dims) > rank:
            return NotImplemented
        tail = ((),) * (rank - places[0] - len(mask.dims))
        return join(call.points, [label, Label((*mask.dims, *tail), mask.spans)], call.why)
    where = join(call.points, [indices[d] for d in places], call.why)
    if where.spans or places[-1] - places[0] >= len(places):
        return NotImplemented
    values = expand(values, [1] * (rank - len(places) + len(where.dims) - len(values.dims)) + [*values.shape])
    inside = range(places[0], places[0] + len(where.dims))
    values = without(call, values, inside)
    rows = [*values.dims[: places[0]], *((),) * len(places), *values.dims[places[0] :]]
    label = settle(call.points, label, places, call.why)
    return join(call.points, [label, Label(tuple(rows), values.spans)], call.why)


@rule("gather scatter scatter_add scatter_reduce")
def along_rule(call: Call) -> Any:
    """Elements from, or to, places along one dimension that another tensor tells."""
    labels, dim = [t for t in call.labels("self", "index", "src") if t.dims], call.dim()
    if len({t.shape[:dim] + t.shape[dim + 1 :] for t in labels}) > 1:
        return NotImplemented
    out = join(call.points, [without(call, t, [dim], keep=True) for t in labels], call.why)
    return replace(out, dim, Factor(call.shape[dim], call.why))


def without(call: Call, label: Label, dims: Sequence[int], keep: bool = False) -> Label:
    """The label of what lies at any one place along some dimensions, which are fixed."""
    return reduce(call.points, settle(call.points, label, dims, call.why), dims, keep, call.why)


@rule("slice_scatter")
def scatter_rule(call: Call) -> Label:
    """A copy with a slice written over: the rest beside what is written."""
    label, source, dim = call["self"], call["src"], call.dim()
    numbers = torch.arange(label.shape[dim])
    written = torch.ops.aten.slice.Tensor(numbers, 0, call["start"], call["end"], call["step"])
    rest = np.setdiff1d(numbers, written)
    parts = [gather(call.points, label, dim, rest, call.why), source] if len(rest) else [source]
    order = np.argsort(np.append(rest, written))
    return gather(call.points, cat(call.points, parts, dim, call.why), dim, order, call.why)


@rule("stack")
def stack_rule(call: Call) -> Label:
    """One after the other along a new dimension."""
    dim = call["dim"] % (len(call["tensors"][0].dims) + 1)
    labels = [Label((*t.dims[:dim], (), *t.dims[dim:]), t.spans) for t in call["tensors"]]
    return cat(call.points, labels, dim, call.why)


@rule("cat")
def cat_rule(call: Call) -> Label:
    """One after the other along a dimension."""
    labels = [label for label in call["tensors"] if 0 not in label.shape]
    return cat(call.points, labels, call["dim"] % len(labels[0].dims), call.why)


@rule("constant_pad_nd")
def pad_rule(call: Call) -> Label:
    """Constants around: they stand still, the rest moves."""
    label, pad = call["self"], call["pad"]
    for k in range(len(pad) // 2):
        dim, edges = len(label.dims) - 1 - k, (pad[2 * k], pad[2 * k + 1])
        if not any(edges):
            continue
        if min(edges) < 0:
            label = settle(call.points, label, [dim], call.why)
        if not label.touching([dim]):
            label = replace(label, dim, Factor(call.shape[dim], reason(label, [dim])))
            continue
        edge = reduce(call.points, label, [dim], True, call.why)
        around = [replace(edge, dim, Factor(n, call.why)) if n else None for n in edges]
        label = cat(call.points, [t for t in (around[0], label, around[1]) if t], dim, call.why)
    return label

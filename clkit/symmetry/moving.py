"""Rules for operations that move elements, or work on each by itself: their labels move the same way."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from clkit.symmetry.labels import (
    Factor,
    Label,
    cat,
    drop,
    expand,
    fixed,
    gather,
    join,
    reduce,
    reorder,
    replace,
    reshape,
)  # fmt: skip
from clkit.symmetry.points import Ids, Points


@dataclass(frozen=True, eq=False)
class Call:
    """One operation at work: where points are tied, its name for reports, its result's shape, its arguments."""

    points: Points
    why: str
    shape: Any
    arguments: dict[str, Any]
    constants: dict[Label, Ids]
    fibre: Ids | None = None  # for the weight of a grouped convolution: points (groups, inputs of a group)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def labels(self, *names: str) -> list[Label]:
        """The labels among the named arguments."""
        return [a for name in names if isinstance(a := self.arguments.get(name), Label)]

    def dim(self, name: str = "dim", of: str = "self") -> int:
        """A dimension argument, counted from the front."""
        return self[name] % len(self[of].dims)


def is_shape(value: Any) -> bool:
    """Is it the shape of one tensor (and not a list of shapes)?"""
    return isinstance(value, torch.Size)


def pointwise_rule(call: Call) -> Any:
    """Elementwise, with broadcasting."""
    if not is_shape(call.shape):
        return NotImplemented
    return join(call.points, [a for a in tree_leaves(call.arguments) if isinstance(a, Label)], call.why)


def filled_rule(call: Call) -> Label:
    """One number everywhere."""
    return expand(Label(((),) * len(call.shape)), call.shape)


def same_rule(call: Call) -> Label:
    """Each element stays where it is."""
    return call.labels(*call.arguments)[0]


def constant_rule(call: Call) -> Label:
    """A tensor that knows the shape of another only."""
    return fixed(call.shape, "constant")


def reshape_rule(call: Call) -> Label:
    """The same elements in row-major order in another shape."""
    return reshape(call.points, same_rule(call), call.shape, call.why)


def permute_rule(call: Call) -> Label:
    """`permute`."""
    return reorder(call["self"], [d % len(call["self"].dims) for d in call["dims"]])


def transpose_rule(call: Call) -> Label:
    """`transpose`, `t`, `mT`: two dimensions change places (the last two if none are named)."""
    rank = len(call["self"].dims)
    order = list(range(rank))
    if rank > 1:
        a, b = (d % rank for d in [v for k, v in call.arguments.items() if k != "self"] or (-1, -2))
        order[a], order[b] = b, a
    return reorder(call["self"], order)


def reverse_rule(call: Call) -> Label:
    """`T`: the dimensions in reverse."""
    return reorder(call["self"], range(len(call["self"].dims))[::-1])


def expand_rule(call: Call) -> Label:
    """Repeats without a copy."""
    return expand(call["self"], call.shape)


def take_rule(call: Call, dim: int, index: Sequence[int] | Ids) -> Label:
    """Known indices along a dimension."""
    return gather(call.points, call["self"], dim, np.asarray(index, np.int64), call.why)


def slice_rule(call: Call) -> Label:
    """Every so many from here to there along a dimension."""
    dim = call.dim()
    picked = range(call["self"].shape[dim])[slice(call["start"], call["end"], call["step"])]
    return take_rule(call, dim, picked)


def select_rule(call: Call) -> Label:
    """One index of a dimension, which goes."""
    dim = call.dim()
    label = take_rule(call, dim, [call["index"] % call["self"].shape[dim]])
    return reorder(label, [d for d in range(len(label.dims)) if d != dim])


def narrow_rule(call: Call) -> Label:
    """A run of indices along a dimension."""
    return take_rule(call, call.dim(), range(call["start"], call["start"] + call["length"]))


def pieces_rule(call: Call) -> list[Label]:
    """`split`, `chunk` and their kin: runs one after the other."""
    dim = call.dim()
    stops = np.cumsum([0, *(shape[dim] for shape in call.shape)])
    return [take_rule(call, dim, range(a, b)) for a, b in pairwise(stops)]


def unbind_rule(call: Call) -> list[Label]:
    """All indices of a dimension, one result each."""
    dim = call.dim()
    rest = [d for d in range(len(call["self"].dims)) if d != dim]
    return [reorder(take_rule(call, dim, [i]), rest) for i in range(call["self"].shape[dim])]


def roll_rule(call: Call) -> Any:
    """Cyclic shifts along dimensions."""
    label = call["self"]
    if len(call["dims"]) != len(call["shifts"]):
        return NotImplemented
    for shift, dim in zip(call["shifts"], call["dims"], strict=True):
        index = np.roll(np.arange(label.shape[dim]), shift)
        label = gather(call.points, label, dim % len(label.dims), index, call.why)
    return label


def flip_rule(call: Call) -> Label:
    """Reversed dimensions."""
    label = call["self"]
    for dim in call["dims"]:
        index = np.arange(label.shape[dim])[::-1]
        label = gather(call.points, label, dim % len(label.dims), index, call.why)
    return label


def repeat_rule(call: Call) -> Label:
    """`repeat`: whole dimensions one after the other."""
    label = call["self"]
    label = Label(((),) * (len(call["repeats"]) - len(label.dims)) + label.dims, label.parts)
    for dim, times in enumerate(call["repeats"]):
        index = np.tile(np.arange(label.shape[dim]), times)
        label = gather(call.points, label, dim, index, call.why)
    return label


def repeat_interleave_rule(call: Call) -> Any:
    """Every index of a dimension so many times."""
    if not isinstance(call.arguments.get("repeats"), int) or call["dim"] is None:
        return NotImplemented
    dim = call.dim()
    return take_rule(call, dim, np.repeat(np.arange(call["self"].shape[dim]), call["repeats"]))


def index_rule(call: Call) -> Any:
    """Indexing by tensors: by known numbers along one dimension; unknown ones pin the dimensions they index."""
    label, indices = call["self"], call["indices"]
    places = [d for d, index in enumerate(indices) if index is not None]
    values = [call.constants.get(indices[d]) for d in places]
    if any(isinstance(i, Label) and i.parts for i in indices) or places != list(range(places[0], places[-1] + 1)):
        return NotImplemented
    if len(places) == 1 and values[0] is not None and values[0].ndim == 1:
        return take_rule(call, places[0], values[0] % label.shape[places[0]])
    label = drop(call.points, label, label.touching(places), call.why)
    tail = len(label.dims) - places[-1] - 1
    new = fixed(call.shape[places[0] : len(call.shape) - tail], call.why).dims
    return Label((*label.dims[: places[0]], *new, *label.dims[places[-1] + 1 :]), label.parts)


def index_select_rule(call: Call) -> Any:
    """Known numbers along one dimension."""
    value = call.constants.get(call["index"])
    return NotImplemented if value is None else take_rule(call, call.dim(), value)


def slice_scatter_rule(call: Call) -> Label:
    """A copy with a slice written over."""
    piece = slice_rule(call)
    join(call.points, [piece, call["src"]], call.why)
    return _written(call["self"], call.why)


def select_scatter_rule(call: Call) -> Label:
    """A copy with one index of a dimension written over."""
    join(call.points, [select_rule(call), call["src"]], call.why)
    return _written(call["self"], call.why)


def _written(label: Label, why: str) -> Label:
    dims = [[f if f.why or label.part(f) else Factor(f.size, why) for f in row] for row in label.dims]
    return Label(tuple(tuple(row) for row in dims), label.parts)


def cat_rule(call: Call) -> Label:
    """One after the other along a dimension."""
    labels = [label for label in call["tensors"] if 0 not in label.shape]
    return cat(call.points, labels, call["dim"] % len(labels[0].dims), call.why)


def stack_rule(call: Call) -> Label:
    """One after the other along a new dimension."""
    dim = call["dim"] % (len(call["tensors"][0].dims) + 1)
    labels = [Label((*t.dims[:dim], (), *t.dims[dim:]), t.parts) for t in call["tensors"]]
    return cat(call.points, labels, dim, call.why)


def pad_rule(call: Call) -> Label:
    """Constant padding moves with the rest; other kinds pin the dimensions they pad."""
    label, pad = call["self"], call["pad"]
    for k in range(len(pad) // 2):
        dim, before, after = len(label.dims) - 1 - k, pad[2 * k], pad[2 * k + 1]
        if not before and not after:
            continue
        if before < 0 or after < 0 or call.arguments.get("mode", "constant") != "constant":
            label = drop(call.points, label, label.touching([dim]), call.why)
        if label.touching([dim]):
            edges = [
                replace(reduce(call.points, label, [dim], True, call.why), dim, Factor(n, call.why))
                for n in (before, after)
            ]
            label = cat(call.points, [edges[0], label, edges[1]], dim, call.why)
        else:
            label = replace(label, dim, Factor(call.shape[dim], reason(label, [dim])))
    return label


def shuffle_rule(call: Call) -> Label:
    """`channel_shuffle`."""
    label, groups = call["self"], call["groups"]
    n, c, *space = label.shape
    label = reshape(call.points, label, (n, groups, c // groups, *space), call.why)
    label = reorder(label, [0, 2, 1, *range(3, len(label.dims))])
    return reshape(call.points, label, (n, c, *space), call.why)


def glu_rule(call: Call) -> Label:
    """The first half of a dimension times the sigmoid of the second."""
    dim = call.dim()
    half = call["self"].shape[dim] // 2
    return join(call.points, [take_rule(call, dim, range(half)), take_rule(call, dim, range(half, 2 * half))], call.why)


def reason(label: Label, dims: Sequence[int]) -> str:
    """Why the first fixed factor of some dimensions is."""
    return next((f.why for d in dims for f in label.dims[d] if f.why), "position")

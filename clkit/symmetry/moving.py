"""The table of rules, and those for operations that move elements or work on each by itself.

A rule ties and pins points until the operation commutes with every permutation that is left. It returns the label of
the operation's result, a list where there are several, or `NotImplemented` for a case that it does not understand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
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
    """One operation at work: its ATen name, what computes it, where points are tied, and what reports call it.

    `shape` is that of its result, or shapes nested as the result is. `constants` are the values of known integers.
    """

    name: str
    target: Any
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

    def dim(self) -> int:
        """The argument `dim`, counted from the front."""
        return self["dim"] % len(self["self"].dims)


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}  # by an operation's ATen name, without its overload and the underscore of what is in place


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


@rule("copy rsub masked_fill floor_divide")
def pointwise_rule(call: Call) -> Any:
    """Elementwise, with broadcasting."""
    if not is_shape(call.shape):
        return NotImplemented
    return join(call.points, [a for a in tree_leaves(call.arguments) if isinstance(a, Label)], call.why)


@rule("alias clone contiguous detach lift_fresh_copy to _to_copy type_as fill zero")
@rule("dropout feature_dropout alpha_dropout hardswish relu6 log_sigmoid")
def same_rule(call: Call) -> Label:
    """Each element stays where it is."""
    return call.labels(*call.arguments)[0]


@rule("zeros_like ones_like full_like")
def filled_rule(call: Call) -> Label:
    """One number everywhere."""
    return expand(Label(((),) * len(call.shape)), call.shape)


@rule("new_zeros new_ones new_full new_empty empty_like")
def constant_rule(call: Call) -> Label:
    """A tensor that knows the shape of another only."""
    return fixed(call.shape, "constant")


@rule("view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as")
def reshape_rule(call: Call) -> Label:
    """The same elements in row-major order in another shape."""
    return reshape(call.points, same_rule(call), call.shape, call.why)


@rule("expand expand_as broadcast_to")
def expand_rule(call: Call) -> Label:
    """Repeats without a copy."""
    return expand(call["self"], call.shape)


@rule("permute transpose swapaxes swapdims t mT")
def transpose_rule(call: Call) -> Label:
    """Dimensions in another order, which the operation shows on a tensor of the sizes 1, 2, 3, ..."""
    sizes = torch.empty([*range(1, len(call["self"].dims) + 1)], device="meta")
    return reorder(call["self"], [n - 1 for n in call.target(**call.arguments | {"self": sizes}).shape])


@rule("numpy_T")
def reverse_rule(call: Call) -> Label:
    """`T`: the dimensions in reverse."""
    return reorder(call["self"], range(len(call["self"].dims))[::-1])


@rule("slice select narrow split split_with_sizes chunk tensor_split unbind index_select roll flip channel_shuffle")
def take_rule(call: Call) -> Any:
    """Elements at known indices along dimensions, for `channel_shuffle` along the channels."""
    return _take(call, call.target, call["self"], call.arguments.get("dims", [call.arguments.get("dim", 1)]))


@rule("repeat")
def repeat_rule(call: Call) -> Any:
    """All dimensions, and new ones in front, one after the other several times."""
    shape = call["self"].shape
    label = expand(call["self"], [1] * (len(call["repeats"]) - len(shape)) + [*shape])
    return _take(call, call.target, label, range(len(label.dims)))


@rule("repeat_interleave")
def repeat_interleave_rule(call: Call) -> Any:
    """Every index of a dimension so many times."""
    if not isinstance(call.arguments.get("repeats"), int) or call["dim"] is None:
        return NotImplemented
    return take_rule(call)


def _take(call: Call, operation: Any, label: Label, dims: Sequence[int], but: str = "") -> Any:
    """The label of what an operation takes along dimensions: it shows the indices on the numbers 0, 1, 2, ..."""
    given = {k: call.constants.get(a) if isinstance(a, Label) else a for k, a in call.arguments.items()}
    given = {k: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for k, a in given.items()}
    if not dims or given.get("index", 0) is None:
        return NotImplemented
    rank, taken = len(label.dims), [label] * (1 if is_shape(call.shape) else len(call.shape))
    for dim in (d % rank for d in dims):
        numbers = torch.arange(label.shape[dim]).view([-1 if d == dim else 1 for d in range(rank)])
        shown = operation(**{k: a for k, a in given.items() if k != but} | {"self": numbers})
        for i, moved in enumerate([shown] if isinstance(shown, Tensor) else shown):
            line = tuple(slice(None) if d == dim else 0 for d in range(rank))
            index = moved[line] if moved.ndim == rank else moved.reshape(-1)
            taken[i] = gather(call.points, taken[i], dim, index.numpy(), call.why)
            if moved.ndim < rank:
                taken[i] = reorder(taken[i], [d for d in range(rank) if d != dim])
    return taken[0] if is_shape(call.shape) else taken


@rule("index")
def index_rule(call: Call) -> Any:
    """Indexing by tensors: by known numbers along one dimension; unknown ones pin the dimensions they index."""
    label, indices = call["self"], call["indices"]
    places = [d for d, index in enumerate(indices) if index is not None]
    values = [call.constants.get(indices[d]) for d in places]
    if any(isinstance(i, Label) and i.spans for i in indices) or places != list(range(places[0], places[-1] + 1)):
        return NotImplemented
    if len(places) == 1 and values[0] is not None and values[0].ndim == 1:
        return gather(call.points, label, places[0], values[0] % label.shape[places[0]], call.why)
    label = drop(call.points, label, label.touching(places), call.why)
    tail = len(label.dims) - places[-1] - 1
    new = fixed(call.shape[places[0] : len(call.shape) - tail], call.why).dims
    return Label((*label.dims[: places[0]], *new, *label.dims[places[-1] + 1 :]), label.spans)


@rule("slice_scatter select_scatter")
def scatter_rule(call: Call) -> Label:
    """A copy with a slice, or with one index of a dimension, written over."""
    label, aten = call["self"], torch.ops.aten
    taken = aten.select.int if "index" in call.arguments else aten.slice.Tensor
    join(call.points, [_take(call, taken, label, [call["dim"]], but="src"), call["src"]], call.why)
    dims = [[f if f.why or label.span(f) else Factor(f.size, call.why) for f in row] for row in label.dims]
    return Label(tuple(tuple(row) for row in dims), label.spans)


@rule("cat concat concatenate")
def cat_rule(call: Call) -> Label:
    """One after the other along a dimension."""
    labels = [label for label in call["tensors"] if 0 not in label.shape]
    return cat(call.points, labels, call["dim"] % len(labels[0].dims), call.why)


@rule("stack")
def stack_rule(call: Call) -> Label:
    """One after the other along a new dimension."""
    dim = call["dim"] % (len(call["tensors"][0].dims) + 1)
    labels = [Label((*t.dims[:dim], (), *t.dims[dim:]), t.spans) for t in call["tensors"]]
    return cat(call.points, labels, dim, call.why)


@rule("pad constant_pad_nd")
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


@rule("glu")
def glu_rule(call: Call) -> Label:
    """The first half of a dimension times the sigmoid of the second."""
    label, dim = call["self"], call.dim()
    halves = np.split(np.arange(label.shape[dim]), 2)
    return join(call.points, [gather(call.points, label, dim, half, call.why) for half in halves], call.why)

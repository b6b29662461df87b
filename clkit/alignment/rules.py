"""What each operation of a graph asks of the points on its operands: one table, operation -> rule.

A rule ties and pins points until the operation commutes with every permutation that is left, and returns the label
of its result (a list where there are several). Elementwise operations need no entry; an operation that is neither
elementwise nor in the table has all its operands pinned, which costs coverage and never correctness.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from clkit.alignment.labels import (
    Factor,
    Label,
    Part,
    cat,
    contract,
    drop,
    expand,
    fixed,
    gather,
    join,
    permute,
    reduce,
    replace,
    reshape,
    split,
    still,
    whole,
)
from clkit.alignment.points import Ids, Points

LETTERS = "abcdefghijklmnop"


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


def propagate(call: Call, target: Any) -> Any:
    """The label of an operation's result, nested as the result is."""
    operands = [a for a in tree_leaves(call.arguments) if isinstance(a, Label)]
    live = any(label.parts for label in operands)
    result = rule(call) if live and (rule := _rule(target)) else NotImplemented
    if result is not NotImplemented:
        return result
    reasons = [f.why for label in operands for row in label.dims for f in row if f.why]
    why = call.why if live else next(iter(reasons), "constant")
    for label in operands:
        drop(call.points, label, label.parts, why)
    return tree_map(lambda shape: None if shape is None else fixed(shape, why), call.shape, is_leaf=is_shape)


def is_shape(value: Any) -> bool:
    """Is it the shape of one tensor (and not a list of shapes)?"""
    return isinstance(value, torch.Size)


def _rule(target: Any) -> Callable[[Call], Any] | None:
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.removeprefix("aten::").rstrip("_")
    pointwise = torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags
    return RULES.get(name) or (_pointwise if pointwise else None)


def _pointwise(call: Call) -> Label:
    return join(call.points, [a for a in tree_leaves(call.arguments) if isinstance(a, Label)], call.why)


def _constant(call: Call) -> Label:
    return fixed(call.shape, "constant")


def _same(call: Call) -> Label:
    return call.labels(*call.arguments)[0]


def _dropout(call: Call) -> Any:
    return NotImplemented if call.arguments.get("train") else _same(call)


def _reshape(call: Call) -> Label:
    return reshape(call.points, _same(call), call.shape, call.why)


def _permute(call: Call) -> Label:
    return permute(call["self"], [d % len(call["self"].dims) for d in call["dims"]])


def _transpose(call: Call) -> Label:
    rank = len(call["self"].dims)
    given = [v for k, v in call.arguments.items() if k != "self"] or [0, 1][:rank]
    order = list(range(rank))
    if rank > 1:
        a, b = given[0] % rank, given[1] % rank
        order[a], order[b] = b, a
    return permute(call["self"], order)


def _expand(call: Call) -> Label:
    return expand(call["self"], call.shape)


def _take(call: Call, dim: int, index: Sequence[int] | Ids) -> Label:
    return gather(call.points, call["self"], dim, np.asarray(index, np.int64), call.why)


def _slice(call: Call) -> Label:
    dim = call.dim()
    picked = range(call["self"].shape[dim])[slice(call["start"], call["end"], call["step"])]
    return _take(call, dim, picked)


def _select(call: Call) -> Label:
    dim = call.dim()
    label = _take(call, dim, [call["index"] % call["self"].shape[dim]])
    return permute(label, [d for d in range(len(label.dims)) if d != dim])


def _narrow(call: Call) -> Label:
    return _take(call, call.dim(), range(call["start"], call["start"] + call["length"]))


def _pieces(call: Call) -> list[Label]:
    dim = call.dim()
    stops = np.cumsum([0, *(shape[dim] for shape in call.shape)])
    return [_take(call, dim, range(a, b)) for a, b in zip(stops, stops[1:], strict=False)]


def _unbind(call: Call) -> list[Label]:
    dim = call.dim()
    rest = [d for d in range(len(call["self"].dims)) if d != dim]
    return [permute(_take(call, dim, [i]), rest) for i in range(call["self"].shape[dim])]


def _roll(call: Call) -> Any:
    label = call["self"]
    if len(call["dims"]) != len(call["shifts"]):
        return NotImplemented
    for shift, dim in zip(call["shifts"], call["dims"], strict=True):
        index = np.roll(np.arange(label.shape[dim]), shift)
        label = gather(call.points, label, dim % len(label.dims), index, call.why)
    return label


def _flip(call: Call) -> Label:
    label = call["self"]
    for dim in call["dims"]:
        index = np.arange(label.shape[dim])[::-1]
        label = gather(call.points, label, dim % len(label.dims), index, call.why)
    return label


def _repeat(call: Call) -> Label:
    label = call["self"]
    label = Label(((),) * (len(call["repeats"]) - len(label.dims)) + label.dims, label.parts)
    for dim, times in enumerate(call["repeats"]):
        index = np.tile(np.arange(label.shape[dim]), times)
        label = gather(call.points, label, dim, index, call.why)
    return label


def _repeat_interleave(call: Call) -> Any:
    if not isinstance(call.arguments.get("repeats"), int) or call["dim"] is None:
        return NotImplemented
    dim = call.dim()
    return _take(call, dim, np.repeat(np.arange(call["self"].shape[dim]), call["repeats"]))


def _index(call: Call) -> Any:
    label, indices = call["self"], call["indices"]
    places = [d for d, index in enumerate(indices) if index is not None]
    values = [call.constants.get(indices[d]) for d in places]
    if any(isinstance(i, Label) and i.parts for i in indices) or places != list(range(places[0], places[-1] + 1)):
        return NotImplemented
    if len(places) == 1 and values[0] is not None and values[0].ndim == 1:
        return _take(call, places[0], values[0] % label.shape[places[0]])
    label = drop(call.points, label, label.touching(places), call.why)
    tail = len(label.dims) - places[-1] - 1
    new = fixed(call.shape[places[0] : len(call.shape) - tail], call.why).dims
    return Label((*label.dims[: places[0]], *new, *label.dims[places[-1] + 1 :]), label.parts)


def _index_select(call: Call) -> Any:
    value = call.constants.get(call["index"])
    return NotImplemented if value is None else _take(call, call.dim(), value)


def _slice_scatter(call: Call) -> Label:
    piece = _slice(call)
    join(call.points, [piece, call["src"]], call.why)
    return _written(call["self"], call.why)


def _select_scatter(call: Call) -> Label:
    join(call.points, [_select(call), call["src"]], call.why)
    return _written(call["self"], call.why)


def _written(label: Label, why: str) -> Label:
    dims = [[f if f.why or label.part(f) else Factor(f.size, why) for f in row] for row in label.dims]
    return Label(tuple(tuple(row) for row in dims), label.parts)


def _cat(call: Call) -> Label:
    labels = [label for label in call["tensors"] if 0 not in label.shape]
    return cat(call.points, labels, call["dim"] % len(labels[0].dims), call.why)


def _stack(call: Call) -> Label:
    dim = call["dim"] % (len(call["tensors"][0].dims) + 1)
    labels = [Label((*t.dims[:dim], (), *t.dims[dim:]), t.parts) for t in call["tensors"]]
    return cat(call.points, labels, dim, call.why)


def _pad(call: Call) -> Label:
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
            label = replace(label, dim, Factor(call.shape[dim], _reason(label, [dim])))
    return label


def _contract(call: Call, labels: Sequence[Label], terms: Sequence[str], out: str) -> Label:
    return contract(call.points, labels, terms, out, call.why)


def _linear(call: Call) -> Label:
    rows = LETTERS[: len(call["input"].dims) - 1]
    out = _contract(call, call.labels("input", "weight"), [rows + "y", "zy"], rows + "z")
    return join(call.points, [out, *call.labels("bias")], call.why)


def _product(call: Call, a: Label, b: Label) -> Label:
    x, y = ("z" if len(a.dims) == 1 else "xz"), ("z" if len(b.dims) == 1 else "zy")
    outer = LETTERS[: max(len(a.dims) - len(x), len(b.dims) - len(y))]
    terms = [outer[len(outer) - len(t.dims) + len(end) :] + end for t, end in ((a, x), (b, y))]
    return _contract(call, [a, b], terms, outer + x[:-1] + y[1:])


def _matmul(call: Call) -> Label:
    return _product(call, *call.labels(*call.arguments))


def _addmm(call: Call) -> Label:
    first, a, b = call.labels(*call.arguments)
    return join(call.points, [first, _product(call, a, b)], call.why)


def _einsum(call: Call) -> Any:
    equation, labels = call["equation"].replace(" ", ""), call["tensors"]
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    widths = [len(t.dims) - len(term.replace("...", "")) for t, term in zip(labels, terms, strict=True)]
    dots = "".join(spare[: max((w for w, t in zip(widths, terms, strict=True) if "..." in t), default=0)])
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        out = ("..." if dots else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    terms = [t.replace("...", dots[len(dots) - w :]) for t, w in zip(terms, widths, strict=True)]
    if any(len(set(term)) < len(term) for term in terms):
        return NotImplemented
    return _contract(call, labels, terms, out.replace("...", dots))


def _attention(call: Call) -> Any:
    query, key, value = call.labels("query", "key", "value")
    if call["enable_gqa"] or len({len(t.dims) for t in (query, key, value)}) > 1:
        return NotImplemented
    if call["is_causal"]:
        rank = len(query.dims)
        query, key, value = (drop(call.points, t, t.touching([rank - 2]), call.why) for t in (query, key, value))
    outer = LETTERS[: len(query.dims) - 2]
    scores = _contract(call, [query, key], [outer + "xz", outer + "yz"], outer + "xy")
    scores = join(call.points, [scores, *call.labels("attn_mask")], call.why)
    split(call.points, scores, [len(outer) + 1], call.why)
    return _contract(call, [scores, value], [outer + "xy", outer + "yz"], outer + "xz")


def _convolution(call: Call) -> Any:
    x, weight = call["input"], call["weight"]
    transposed, groups = call.arguments.get("transposed", "output_padding" in call.arguments), call["groups"]
    batched = len(x.dims) == len(weight.dims)
    if not batched:
        x = Label(((), *x.dims), x.parts)
    space = range(2, len(x.dims))
    x = drop(call.points, x, x.touching(space), call.why)
    weight = drop(call.points, weight, weight.touching(space), "kernel position")
    shape = call.shape if batched else (1, *call.shape)
    spread = [Label(((), t.dims[0], *((),) * len(space)), t.parts) for t in call.labels("bias")]
    if groups == 1:
        flat_x, flat_w = Label(x.dims[:2], x.parts), Label(weight.dims[:2], weight.parts)
        out = _contract(call, [flat_x, flat_w], ["ac", "cb" if transposed else "bc"], "ab")
    elif transposed:
        return NotImplemented
    else:
        out = _grouped(call, x, weight, groups)
    where = fixed(shape[2:], _reason(x, space)).dims
    out = join(call.points, [Label((*out.dims, *where), out.parts), *spread], call.why)
    return out if batched else Label(out.dims[1:], out.parts)


def _grouped(call: Call, x: Label, weight: Label, groups: int) -> Label:
    """Groups move whole, and channels within each: the inputs of a group are rows, so are its outputs."""
    inputs, outputs = line(call.points, x, 1, call.why), line(call.points, weight, 0, call.why)
    outputs = outputs.reshape(groups, -1)
    if len(inputs) == groups:
        blocks = inputs
    elif call.fibre is not None:
        call.points.unite(inputs, call.fibre, call.why)
        blocks = call.points.rows(inputs.reshape(groups, -1), call.why)
    else:
        call.points.pin(inputs.reshape(groups, -1), call.why, (1,))
        drop(call.points, weight, weight.touching([1]), call.why)
        blocks = call.points.rows(inputs.reshape(groups, -1), call.why)
    call.points.unite(call.points.rows(outputs, call.why), blocks, call.why)
    channels = Factor(outputs.size)
    batch = drop(call.points, x, [p for p in x.touching([0]) if p in x.touching([1])], call.why)
    return Label((batch.dims[0], (channels,)), (*batch.touching([0]), Part(outputs.ravel(), (channels,))))


def line(points: Points, label: Label, dim: int, why: str) -> Ids:
    """The points along one dimension, new ones that stand still where it is fixed."""
    label = whole(points, label, dim, why)
    label = drop(points, label, [p for p in label.touching([dim]) if p.points.ndim > 1], why)
    parts = label.touching([dim])
    return parts[0].points if parts else still(points, label.shape[dim], _reason(label, [dim]))


def _reason(label: Label, dims: Sequence[int]) -> str:
    return next((f.why for d in dims for f in label.dims[d] if f.why), "position")


def _spatial(call: Call) -> Any:
    shapes = tree_leaves(call.shape, is_leaf=is_shape)
    label, rank = _same(call), len(shapes[0])
    dims = [d for d in range(rank) if d >= rank - _spatial_dims(call)]
    reason = _reason(label, dims)
    label = drop(call.points, label, label.touching(dims), call.why)
    out = [Label((*label.dims[: dims[0]], *fixed(s[dims[0] :], reason).dims), label.parts) for s in shapes]
    return out[0] if is_shape(call.shape) else out


def _spatial_dims(call: Call) -> int:
    return int(next(c for c in call.why if c.isdigit()))


def _channels(call: Call, label: Label, *names: str) -> Label:
    """Joins per-channel tensors to a label along dimension 1."""
    tail = ((),) * (len(label.dims) - 2)
    spread = [Label(((), t.dims[0], *tail), t.parts) for t in call.labels(*names)]
    return join(call.points, [label, *spread], call.why)


def _batch_norm(call: Call) -> Any:
    label = call["input"]
    if call.arguments.get("training") or call.arguments.get("use_input_stats"):
        split(call.points, label, [1] if "training" in call.arguments else range(2, len(label.dims)), call.why)
    out = _channels(call, label, "weight", "bias", "running_mean", "running_var")
    return out if is_shape(call.shape) else [out, *(fixed(s, call.why) for s in call.shape[1:])]


def _group_norm(call: Call) -> Label:
    label, shape = call["input"], call["input"].shape
    groups = call["num_groups"]
    grouped = reshape(call.points, label, (shape[0], groups, shape[1] // groups, *shape[2:]), call.why)
    split(call.points, grouped, range(2, len(grouped.dims)), call.why)
    return _channels(call, label, "weight", "bias")


def _layer_norm(call: Call) -> Label:
    label, rank = call["input"], len(call["input"].dims)
    split(call.points, label, range(rank - len(call["normalized_shape"]), rank), call.why)
    return join(call.points, [label, *call.labels("weight", "bias")], call.why)


def _softmax(call: Call) -> Label:
    split(call.points, call["self"], [call.dim()], call.why)
    return call["self"]


def _reduce(call: Call) -> Label:
    label, dims = call["self"], call.arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    dims = [d % len(label.dims) for d in dims] if dims else range(len(label.dims))
    return reduce(call.points, label, list(dims), bool(call.arguments.get("keepdim")), call.why)


def _ordered(call: Call) -> Any:
    """Operations that look at the order along one dimension: that one is pinned."""
    if call.arguments.get("dim") is None:
        return NotImplemented
    label, dim = call["self"], call.dim()
    label = drop(call.points, label, label.touching([dim]), call.why)
    shapes = tree_leaves(call.shape, is_leaf=is_shape)
    if len(shapes[0]) < len(label.dims):
        out = permute(label, [d for d in range(len(label.dims)) if d != dim])
    else:
        out = replace(label, dim, Factor(shapes[0][dim], call.why))
    return out if is_shape(call.shape) else [out for _ in shapes]


def _embedding(call: Call) -> Label:
    weight = drop(call.points, call["weight"], call["weight"].touching([0]), "input")
    return Label((*fixed(call.shape[:-1], "input").dims, weight.dims[1]), weight.parts)


def _glu(call: Call) -> Label:
    dim = call.dim()
    half = call["self"].shape[dim] // 2
    return join(
        call.points, [_take(call, dim, range(half)), _take(call, dim, range(half, 2 * half))], call.why
    )


def _prelu(call: Call) -> Label:
    return _channels(call, call["self"], "weight") if len(call["self"].dims) > 1 else _pointwise(call)


def _shuffle(call: Call) -> Label:
    label, groups = call["self"], call["groups"]
    n, c, *space = label.shape
    label = reshape(call.points, label, (n, groups, c // groups, *space), call.why)
    label = permute(label, [0, 2, 1, *range(3, len(label.dims))])
    return reshape(call.points, label, (n, c, *space), call.why)


RULES: dict[str, Callable[[Call], Any]] = {
    **dict.fromkeys(
        ("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like"),
        _constant),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _dropout),
    **dict.fromkeys(
        ("alias", "clone", "contiguous", "detach", "lift_fresh_copy", "to", "_to_copy", "type_as", "fill", "zero",
         "_assert_tensor_metadata", "positive", "cpu", "float", "hardswish", "relu6", "log_sigmoid"), _same),
    **dict.fromkeys(("copy", "rsub", "masked_fill", "floor_divide"), _pointwise),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
         "reshape_as"), _reshape),
    "permute": _permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t", "numpy_T"), _transpose),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "slice": _slice,
    "select": _select,
    "narrow": _narrow,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _pieces),
    "unbind": _unbind,
    "roll": _roll,
    "flip": _flip,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "index": _index,
    "index_select": _index_select,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _addmm),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
         "conv_transpose3d"), _convolution),
    **dict.fromkeys(
        (f"{kind}{n}d" for n in (1, 2, 3) for kind in (
            "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest",
            "upsample_bilinear", "upsample_bicubic")), _spatial),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training", "instance_norm"), _batch_norm),
    "group_norm": _group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "prod", "any",
         "all"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "sort", "argsort", "topk", "max", "min", "argmax"), _ordered),
    "embedding": _embedding,
    "glu": _glu,
    "prelu": _prelu,
    "channel_shuffle": _shuffle,
}

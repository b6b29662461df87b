"""What each operation of a graph asks of the points on its operands; and the rules of operations that mix elements.

Elementwise operations need no entry in the table. An operation that is neither elementwise nor in the table has all
its operands pinned, which costs coverage and never correctness.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from clkit.symmetry.labels import (
    Factor,
    Label,
    Span,
    drop,
    fixed,
    flatten,
    join,
    loose,
    reduce,
    reorder,
    replace,
    reshape,
    separate,
    settle,
    tidy,
)  # fmt: skip
from clkit.symmetry.moving import RULES, Call, Rule, is_shape, pointwise_rule, reason, rule
from clkit.symmetry.points import Ids, Points

_LETTERS = "abcdefghijklmnop"


def _contract(call: Call, labels: Sequence[Label], terms: Sequence[str], out: str) -> Label:
    """The label of an einsum: a product over letters, summed over those that are not in `out`."""
    letters = out + "".join(sorted(set("".join(terms)) - set(out)))
    spread = [
        Label(tuple(label.dims[term.index(a)] if a in term else () for a in letters), label.spans)
        for label, term in zip(labels, terms, strict=True)
    ]
    product = join(call.points, spread, call.why)
    return reduce(call.points, product, range(len(out), len(letters)), False, call.why)


@rule("mm bmm")
def product_rule(call: Call) -> Label:
    """Matrix products, of batches too."""
    batch = _LETTERS[: len(call["self"].dims) - 2]
    return _contract(call, call.labels("self", "mat2"), [batch + "xz", batch + "zy"], batch + "xy")


@rule("addmm")
def addmm_rule(call: Call) -> Label:
    """A sum with a matrix product."""
    product = _contract(call, call.labels("mat1", "mat2"), ["xz", "zy"], "xy")
    return join(call.points, [call["self"], product], call.why)


@rule("_grouped_mm grouped_mm_fallback")
def experts_rule(call: Call) -> Any:
    """Rows sorted by expert, each run times the matrix of its expert: one order for all experts, whose ends are told.

    A bias has a row for each expert, as no other operation has: it is not understood.
    """
    first, second, *ends = call.labels(*call.arguments)
    if len(first.dims) != 2 or len(second.dims) != 3 or call.labels("bias"):
        return NotImplemented
    for label in ends:
        settle(call.points, label, range(len(label.dims)), call.why)
    rows, experts = settle(call.points, first, [0], call.why), settle(call.points, second, [0], call.why)
    return _contract(call, [rows, experts], ["xz", "ezy"], "xy")


@rule("_cdist_forward")
def distance_rule(call: Call) -> Label:
    """Distances between the rows of two matrices, of batches too."""
    labels = call.labels("x1", "x2")
    rank = max(len(t.dims) for t in labels)
    labels = [Label((*((),) * (rank - len(t.dims)), *t.dims), t.spans) for t in labels]
    batch = _LETTERS[: rank - 2]
    return _contract(call, labels, [batch + "xz", batch + "yz"], batch + "xy")


@rule("scaled_dot_product_attention")
def attention_rule(call: Call) -> Any:
    """Scaled dot-product attention; a causal mask fixes the positions, several heads may share keys and values."""
    labels = call.labels("query", "key", "value")
    rank = len(labels[0].dims)
    if any(len(t.dims) != rank for t in labels):
        return NotImplemented
    if call["is_causal"]:
        labels = [settle(call.points, t, [rank - 2], call.why) for t in labels]
    if call["enable_gqa"]:
        labels = [_shared(t, rank - 3, labels[0].shape[rank - 3]) for t in labels]
    query, key, value = labels
    outer = _LETTERS[: rank - 2]
    scores = _contract(call, [query, key], [outer + "xz", outer + "yz"], outer + "xy")
    scores = join(call.points, [scores, *call.labels("attn_mask")], call.why)
    scores = separate(call.points, scores, [rank - 1], call.why)
    return _contract(call, [scores, value], [outer + "xy", outer + "yz"], outer + "xz")


def _shared(label: Label, dim: int, size: int) -> Label:
    """The label with every index of a dimension so often in sequence that there are `size`."""
    rows = [*label.dims]
    rows[dim] = (*rows[dim], Factor(size // label.shape[dim]))
    return tidy(rows, label.spans)


@rule("convolution")
def convolution_rule(call: Call) -> Label:
    """Convolutions, transposed ones too: a product over channels; positions in images and kernels are fixed."""
    x, weight = call["input"], call["weight"]
    sizes = zip(weight.shape[2:], call["stride"], call["padding"], call["output_padding"], strict=True)
    space = [d for d, taps in enumerate(sizes, 2) if taps != (1, 1, 0, 0)]  # a kernel of one leaves positions alone
    x = settle(call.points, x, space, call.why)
    weight = settle(call.points, weight, range(2, len(weight.dims)), "kernel position")
    if call["groups"] == 1:
        where = _LETTERS[3 : len(x.dims) + 1]
        flat = Label(weight.dims[:2], weight.spans)
        out = _contract(call, [x, flat], ["ac" + where, "cb" if call["transposed"] else "bc"], "ab" + where)
    else:
        out = _grouped(call, x, weight)
    for d in space:
        out = replace(out, d, Factor(call.shape[d], reason(x, [d])))
    return _channels(call, out, "bias")


def _grouped(call: Call, x: Label, weight: Label) -> Label:
    """Groups move whole, and channels within each: the channels of a group are rows, where they come in and go out.

    Dimension 0 of the weight holds the channels of all groups on one side, dimension 1 a group's on the other.
    """
    points, why, groups = call.points, call.why, call["groups"]
    inputs, whole = (line(points, t, k, why).reshape(groups, -1) for t, k in ((x, 1), (weight, 0)))
    part = call.fibre
    if part is None:
        settle(points, weight, [1], why)
        part = points.fresh(groups, weight.shape[1])
        points.pin(part, why, (1,))
    given, outputs = (whole, part) if call["transposed"] else (part, whole)
    points.unite(inputs, given, why)
    one, other = points.rows(inputs), points.rows(outputs)
    if one is None or other is None:
        points.pin(inputs, why)
        points.pin(outputs, why)
    else:
        points.unite(one, other, why)
    channels = Factor(outputs.size)
    label = drop(points, x, [p for p in x.touching([1]) if not set(p.factors) <= set(x.dims[1])], why)
    spans = [p for p in label.spans if p not in label.touching([1])]
    return Label((label.dims[0], (channels,), *label.dims[2:]), (*spans, Span(outputs.ravel(), (channels,))))


def line(points: Points, label: Label, dim: int, why: str) -> Ids:
    """The points along one dimension: new ones that stand still where it is fixed, or free where it is uniform."""
    label = flatten(points, label, dim, why)
    label = drop(points, label, [p for p in label.touching([dim]) if p.points.ndim > 1], why)
    spans = label.touching([dim])
    return spans[0].points if spans else loose(points, label, dim, reason(label, [dim]))


@rule("avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d")
@rule("adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d grid_sampler_2d upsample_bilinear2d")
@rule("upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa")
def spatial_rule(call: Call) -> Any:
    """Pooling and resizing: the last dimensions are fixed; so are the rows, where another tensor says where to look."""
    label, *others = call.labels(*call.arguments)
    for other in others:
        drop(call.points, other, other.spans, call.why)
    count = next(int(c) for c in call.name if c.isdigit())  # the operation's name says how many
    dims = range(len(label.dims) - count, len(label.dims))
    why = reason(label, dims)
    label = settle(call.points, label, [*dims, *([0] if others else [])], call.why)
    shapes = [call.shape] if is_shape(call.shape) else call.shape
    out = [tidy((*label.dims[: dims[0]], *fixed(s[dims[0] :], why).dims), label.spans) for s in shapes]
    return out[0] if is_shape(call.shape) else out


def _channels(call: Call, label: Label, *names: str) -> Label:
    """Joins per-channel tensors to a label along dimension 1."""
    tail = ((),) * (len(label.dims) - 2)
    spread = [Label(((), t.dims[0], *tail), t.spans) for t in call.labels(*names)]
    return join(call.points, [label, *spread], call.why)


@rule("_native_batch_norm_legit_no_training _native_batch_norm_legit _native_batch_norm_legit_functional")
def batch_norm_rule(call: Call) -> list[Label]:
    """Normalisation of each channel, by given statistics or by its own."""
    label = call["input"]
    others = [d for d in range(len(label.dims)) if d != 1]
    if not call.name.endswith("no_training"):
        label = separate(call.points, label, others, call.why)
    out = _channels(call, label, "weight", "bias", "running_mean", "running_var")
    statistics = reduce(call.points, out, others, False, call.why)
    return [out, *(statistics if s == statistics.shape else fixed(s, call.why) for s in call.shape[1:])]


@rule("native_group_norm")
def group_norm_rule(call: Call) -> list[Label]:
    """Normalisation of each run of channels: these move in blocks."""
    label, shape, groups = call["input"], call["input"].shape, call["group"]
    grouped = reshape(call.points, label, (shape[0], groups, shape[1] // groups, *shape[2:]), call.why)
    inner = range(2, len(grouped.dims))
    grouped = separate(call.points, grouped, inner, call.why)
    out = _channels(call, reshape(call.points, grouped, shape, call.why), "weight", "bias")
    return [out, *[reduce(call.points, grouped, inner, False, call.why)] * 2]


@rule("native_layer_norm")
def layer_norm_rule(call: Call) -> list[Label]:
    """Normalisation over the last dimensions."""
    label, rank = call["input"], len(call["input"].dims)
    inner = range(rank - len(call["normalized_shape"]), rank)
    label = separate(call.points, label, inner, call.why)
    out = join(call.points, [label, *call.labels("weight", "bias")], call.why)
    return [out, *[reduce(call.points, label, inner, True, call.why)] * 2]


@rule("_softmax _log_softmax")
def softmax_rule(call: Call) -> Label:
    """A dimension is normalised whatever its order."""
    return separate(call.points, call["self"], [call.dim()], call.why)


@rule("mean sum amax amin var var_mean any all prod")
def reduce_rule(call: Call) -> Any:
    """Sums and the like, over some or all dimensions."""
    label, dims = call["self"], call.arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    dims = [d % len(label.dims) for d in dims] if dims else range(len(label.dims))
    out = reduce(call.points, label, list(dims), bool(call.arguments.get("keepdim")), call.why)
    return out if is_shape(call.shape) else [out for _ in call.shape]


@rule("cumsum cumprod logcumsumexp cummax cummin sort topk kthvalue median mode max min argmax argmin")
def ordered_rule(call: Call) -> Any:
    """Operations that look at the order along one dimension: that one is fixed."""
    if call.arguments.get("dim") is None:
        return NotImplemented
    label, dim = call["self"], call.dim()
    label = settle(call.points, label, [dim], call.why)
    shapes = [call.shape] if is_shape(call.shape) else call.shape
    if len(shapes[0]) < len(label.dims):
        out = reorder(label, [d for d in range(len(label.dims)) if d != dim])
    else:
        out = replace(label, dim, Factor(shapes[0][dim], call.why))
    return out if is_shape(call.shape) else [out for _ in shapes]


@rule("embedding")
def embedding_rule(call: Call) -> Label:
    """Rows of a weight, which stand still, where the indices are."""
    weight = settle(call.points, call["weight"], [0], "input")
    indices = join(call.points, [call["indices"]], call.why)
    return Label((*indices.dims, weight.dims[1]), (*indices.spans, *weight.spans))


def propagate(call: Call) -> Any:
    """The label of an operation's result, nested as the result is."""
    operands = [a for a in tree_leaves(call.arguments) if isinstance(a, Label)]
    shapes = [s for s in tree_leaves(call.shape, is_leaf=is_shape) if is_shape(s)]
    numbers = not any(label.dims for label in operands) and all(prod(s) == 1 for s in shapes)
    if numbers or all(0 in s for s in shapes):
        return tree_map(lambda s: fixed(s, "empty") if is_shape(s) else None, call.shape, is_leaf=is_shape)
    found = rule_of(call.node.target)
    if found and (result := found(call)) is not NotImplemented:
        assert [t.shape for t in tree_leaves(result) if t is not None] == shapes, call.why
        return result
    live = any(label.spans for label in operands)
    reasons = [f.why for label in operands for row in label.dims for f in row if f.why]
    why = call.why if live else next(iter(reasons), "constant")
    for label in operands:
        drop(call.points, label, label.spans, why)
    return tree_map(lambda shape: None if shape is None else fixed(shape, why), call.shape, is_leaf=is_shape)


def rule_of(target: Any) -> Rule | None:
    """The rule for what a node of a graph calls, if there is one."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "transformers"):
        return None
    if torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags:
        return pointwise_rule
    return RULES.get(target._schema.name.partition("::")[2])

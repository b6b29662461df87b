"""What each operation of a graph asks of the points on its operands; and the rules of operations that mix elements.

Elementwise operations need no entry in the table. An operation that is neither elementwise nor in the table has all
its operands pinned, which costs coverage and never correctness.
"""

from collections.abc import Sequence
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
    into_blocks,
    join,
    reduce,
    reorder,
    replace,
    reshape,
    still,
)  # fmt: skip
from clkit.symmetry.moving import RULES, Call, Rule, is_shape, pointwise_rule, reason, rule, same_rule
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


@rule("linear")
def linear_rule(call: Call) -> Label:
    """x @ weight.T + bias."""
    rows = _LETTERS[: len(call["input"].dims) - 1]
    out = _contract(call, call.labels("input", "weight"), [rows + "y", "zy"], rows + "z")
    return join(call.points, [out, *call.labels("bias")], call.why)


def _product(call: Call, a: Label, b: Label) -> Label:
    x, y = ("z" if len(a.dims) == 1 else "xz"), ("z" if len(b.dims) == 1 else "zy")
    outer = _LETTERS[: max(len(a.dims) - len(x), len(b.dims) - len(y))]
    terms = [outer[len(outer) - len(t.dims) + len(end) :] + end for t, end in ((a, x), (b, y))]
    return _contract(call, [a, b], terms, outer + x[:-1] + y[1:])


@rule("matmul mm bmm mv dot")
def matmul_rule(call: Call) -> Label:
    """`matmul` and its special cases."""
    return _product(call, *call.labels(*call.arguments))


@rule("addmm baddbmm addmv")
def addmm_rule(call: Call) -> Label:
    """A sum with a matrix product."""
    first, a, b = call.labels(*call.arguments)
    return join(call.points, [first, _product(call, a, b)], call.why)


@rule("einsum")
def einsum_rule(call: Call) -> Any:
    """`einsum`, but for traces."""
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


@rule("scaled_dot_product_attention")
def attention_rule(call: Call) -> Any:
    """Scaled dot-product attention; a causal mask pins the positions."""
    query, key, value = call.labels("query", "key", "value")
    if call["enable_gqa"] or len({len(t.dims) for t in (query, key, value)}) > 1:
        return NotImplemented
    if call["is_causal"]:
        rank = len(query.dims)
        query, key, value = (drop(call.points, t, t.touching([rank - 2]), call.why) for t in (query, key, value))
    outer = _LETTERS[: len(query.dims) - 2]
    scores = _contract(call, [query, key], [outer + "xz", outer + "yz"], outer + "xy")
    scores = join(call.points, [scores, *call.labels("attn_mask")], call.why)
    into_blocks(call.points, scores, [len(outer) + 1], call.why)
    return _contract(call, [scores, value], [outer + "xy", outer + "yz"], outer + "xz")


@rule("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d")
def convolution_rule(call: Call) -> Any:
    """Convolutions: like a product over channels; positions in images and kernels are pinned."""
    x, weight = call["input"], call["weight"]
    transposed, groups = call.arguments.get("transposed", "output_padding" in call.arguments), call["groups"]
    batched = len(x.dims) == len(weight.dims)
    if not batched:
        x = Label(((), *x.dims), x.spans)
    space = range(2, len(x.dims))
    x = drop(call.points, x, x.touching(space), call.why)
    weight = drop(call.points, weight, weight.touching(space), "kernel position")
    shape = call.shape if batched else (1, *call.shape)
    spread = [Label(((), t.dims[0], *((),) * len(space)), t.spans) for t in call.labels("bias")]
    if groups == 1:
        flat_x, flat_w = Label(x.dims[:2], x.spans), Label(weight.dims[:2], weight.spans)
        out = _contract(call, [flat_x, flat_w], ["ac", "cb" if transposed else "bc"], "ab")
    elif transposed:
        return NotImplemented
    else:
        out = _grouped(call, x, weight, groups)
    where = fixed(shape[2:], reason(x, space)).dims
    out = join(call.points, [Label((*out.dims, *where), out.spans), *spread], call.why)
    return out if batched else Label(out.dims[1:], out.spans)


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
    return Label((batch.dims[0], (channels,)), (*batch.touching([0]), Span(outputs.ravel(), (channels,))))


def line(points: Points, label: Label, dim: int, why: str) -> Ids:
    """The points along one dimension, new ones that stand still where it is fixed."""
    label = flatten(points, label, dim, why)
    label = drop(points, label, [p for p in label.touching([dim]) if p.points.ndim > 1], why)
    spans = label.touching([dim])
    return spans[0].points if spans else still(points, label.shape[dim], reason(label, [dim]))


@rule("max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d")
@rule("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d")
@rule("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d")
@rule("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d")
def spatial_rule(call: Call) -> Any:
    """Pooling and resizing: the last dimensions are pinned."""
    shapes = tree_leaves(call.shape, is_leaf=is_shape)
    label, rank = same_rule(call), len(shapes[0])
    count = next(int(c) for c in call.name if c.isdigit())  # the operation's name says how many
    dims = range(rank - count, rank)
    why = reason(label, dims)
    label = drop(call.points, label, label.touching(dims), call.why)
    out = [Label((*label.dims[: dims[0]], *fixed(s[dims[0] :], why).dims), label.spans) for s in shapes]
    return out[0] if is_shape(call.shape) else out


def _channels(call: Call, label: Label, *names: str) -> Label:
    """Joins per-channel tensors to a label along dimension 1."""
    tail = ((),) * (len(label.dims) - 2)
    spread = [Label(((), t.dims[0], *tail), t.spans) for t in call.labels(*names)]
    return join(call.points, [label, *spread], call.why)


@rule("batch_norm _native_batch_norm_legit_no_training instance_norm")
def batch_norm_rule(call: Call) -> Any:
    """Normalisation of each channel."""
    label = call["input"]
    if call.arguments.get("training") or call.arguments.get("use_input_stats"):
        into_blocks(call.points, label, [1] if "training" in call.arguments else range(2, len(label.dims)), call.why)
    out = _channels(call, label, "weight", "bias", "running_mean", "running_var")
    return out if is_shape(call.shape) else [out, *(fixed(s, call.why) for s in call.shape[1:])]


@rule("group_norm")
def group_norm_rule(call: Call) -> Label:
    """Normalisation of each run of channels: these move in blocks."""
    label, shape = call["input"], call["input"].shape
    groups = call["num_groups"]
    grouped = reshape(call.points, label, (shape[0], groups, shape[1] // groups, *shape[2:]), call.why)
    into_blocks(call.points, grouped, range(2, len(grouped.dims)), call.why)
    return _channels(call, label, "weight", "bias")


@rule("layer_norm rms_norm")
def layer_norm_rule(call: Call) -> Label:
    """Normalisation over the last dimensions."""
    label, rank = call["input"], len(call["input"].dims)
    into_blocks(call.points, label, range(rank - len(call["normalized_shape"]), rank), call.why)
    return join(call.points, [label, *call.labels("weight", "bias")], call.why)


@rule("softmax log_softmax _softmax _log_softmax _safe_softmax")
def softmax_rule(call: Call) -> Label:
    """A dimension is normalised whatever its order."""
    into_blocks(call.points, call["self"], [call.dim()], call.why)
    return call["self"]


@rule("mean sum amax amin var std norm linalg_vector_norm logsumexp prod any all")
def reduce_rule(call: Call) -> Label:
    """Sums and the like, over some or all dimensions."""
    label, dims = call["self"], call.arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    dims = [d % len(label.dims) for d in dims] if dims else range(len(label.dims))
    return reduce(call.points, label, list(dims), bool(call.arguments.get("keepdim")), call.why)


@rule("cumsum cumprod sort argsort topk max min argmax argmin")
def ordered_rule(call: Call) -> Any:
    """Operations that look at the order along one dimension: that one is pinned."""
    if call.arguments.get("dim") is None:
        return NotImplemented
    label, dim = call["self"], call.dim()
    label = drop(call.points, label, label.touching([dim]), call.why)
    shapes = tree_leaves(call.shape, is_leaf=is_shape)
    if len(shapes[0]) < len(label.dims):
        out = reorder(label, [d for d in range(len(label.dims)) if d != dim])
    else:
        out = replace(label, dim, Factor(shapes[0][dim], call.why))
    return out if is_shape(call.shape) else [out for _ in shapes]


@rule("embedding")
def embedding_rule(call: Call) -> Label:
    """Rows of a weight that the input picks."""
    weight = drop(call.points, call["weight"], call["weight"].touching([0]), "input")
    return Label((*fixed(call.shape[:-1], "input").dims, weight.dims[1]), weight.spans)


@rule("prelu")
def prelu_rule(call: Call) -> Label:
    """Leaky ReLU with a slope for each channel."""
    return _channels(call, call["self"], "weight") if len(call["self"].dims) > 1 else pointwise_rule(call)


def propagate(call: Call) -> Any:
    """The label of an operation's result, nested as the result is."""
    operands = [a for a in tree_leaves(call.arguments) if isinstance(a, Label)]
    live = any(label.spans for label in operands)
    result = known(call) if live and (known := _rule(call)) else NotImplemented
    if result is not NotImplemented:
        return result
    reasons = [f.why for label in operands for row in label.dims for f in row if f.why]
    why = call.why if live else next(iter(reasons), "constant")
    for label in operands:
        drop(call.points, label, label.spans, why)
    return tree_map(lambda shape: None if shape is None else fixed(shape, why), call.shape, is_leaf=is_shape)


def _rule(call: Call) -> Rule | None:
    target = call.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    if torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags:
        return pointwise_rule
    return RULES.get(call.name)

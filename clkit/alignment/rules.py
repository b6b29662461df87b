"""What each operation of a graph asks of the points on its operands: one table, operation -> rule.

A rule ties and pins points until the operation commutes with every permutation that is left, and returns the label
of its result (a list where there are several). Elementwise operations need no entry; an operation that is neither
elementwise nor in the table has all its operands pinned, which costs coverage and never correctness.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from clkit.alignment import mixing, moving
from clkit.alignment.calls import Call, is_shape
from clkit.alignment.labels import Label, drop, fixed


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


def _rule(target: Any) -> Callable[[Call], Any] | None:
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    if torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags:
        return moving.pointwise_rule
    return RULES.get(target._schema.name.removeprefix("aten::").rstrip("_"))


_TABLE: tuple[tuple[str, Callable[[Call], Any]], ...] = (
    ("alias clone contiguous detach lift_fresh_copy to _to_copy type_as fill zero", moving.same_rule),
    ("dropout feature_dropout alpha_dropout hardswish relu6 log_sigmoid", moving.same_rule),
    ("copy rsub masked_fill floor_divide", moving.pointwise_rule),
    ("zeros_like ones_like full_like", moving.filled_rule),
    ("new_zeros new_ones new_full new_empty empty_like", moving.constant_rule),
    ("view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as", moving.reshape_rule),
    ("permute", moving.permute_rule),
    ("transpose swapaxes swapdims t mT", moving.transpose_rule),
    ("numpy_T", moving.reverse_rule),
    ("expand expand_as broadcast_to", moving.expand_rule),
    ("slice", moving.slice_rule),
    ("select", moving.select_rule),
    ("narrow", moving.narrow_rule),
    ("split split_with_sizes chunk tensor_split", moving.pieces_rule),
    ("unbind", moving.unbind_rule),
    ("roll", moving.roll_rule),
    ("flip", moving.flip_rule),
    ("repeat", moving.repeat_rule),
    ("repeat_interleave", moving.repeat_interleave_rule),
    ("index", moving.index_rule),
    ("index_select", moving.index_select_rule),
    ("slice_scatter", moving.slice_scatter_rule),
    ("select_scatter", moving.select_scatter_rule),
    ("cat concat concatenate", moving.cat_rule),
    ("stack", moving.stack_rule),
    ("pad constant_pad_nd", moving.pad_rule),
    ("channel_shuffle", moving.shuffle_rule),
    ("glu", moving.glu_rule),
    ("prelu", mixing.prelu_rule),
    ("linear", mixing.linear_rule),
    ("matmul mm bmm mv dot", mixing.matmul_rule),
    ("addmm baddbmm addmv", mixing.addmm_rule),
    ("einsum", mixing.einsum_rule),
    ("scaled_dot_product_attention", mixing.attention_rule),
    ("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d", mixing.convolution_rule),
    ("max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d", mixing.spatial_rule),
    ("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", mixing.spatial_rule),
    ("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d", mixing.spatial_rule),
    ("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d", mixing.spatial_rule),
    ("batch_norm _native_batch_norm_legit_no_training instance_norm", mixing.batch_norm_rule),
    ("group_norm", mixing.group_norm_rule),
    ("layer_norm rms_norm", mixing.layer_norm_rule),
    ("softmax log_softmax _softmax _log_softmax _safe_softmax", mixing.softmax_rule),
    ("mean sum amax amin var std norm linalg_vector_norm logsumexp prod any all", mixing.reduce_rule),
    ("cumsum cumprod sort argsort topk max min argmax argmin", mixing.ordered_rule),
    ("embedding", mixing.embedding_rule),
)
RULES = {name: rule for names, rule in _TABLE for name in names.split()}

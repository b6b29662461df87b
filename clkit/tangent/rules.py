"""Derivatives of the common layers for the tangent pass, where torch's are slow or missing."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class Rules(TorchFunctionMode):
    """Derivatives of the common layers that are quicker than torch's forward mode, or that it lacks.

    Torch's rules are composed of many elementwise operations, and each tangent gets a graph. Here the network's own
    pass is left as it is, graph and fused kernels included, and tangents are computed beside it without a graph:
    bilinear layers (x, w) -> y push by op(x, dw) + op(dx, w); normalisations and softmax have a symmetric Jacobian, so
    that their push is what their backward kernel computes. Every other operation falls to torch's rules.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = RULES.get(func)
        return rule(func, *args, **(kwargs or {})) if rule else func(*args, **(kwargs or {}))


def _parts(tensor: Tensor | None) -> tuple[Any, Any]:
    return (None, None) if tensor is None else unpack_dual(tensor)


def _bilinear(op: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **more: Any) -> Tensor:
    (x, dx), (w, dw), (b, db) = _parts(input), _parts(weight), _parts(bias)
    if dw is None or (b is not None and db is None):
        return op(input, weight, bias, *rest, **more)
    y = op(x, w, b, *rest, **more)
    with torch.no_grad():
        push = op(x, dw, db, *rest, **more)
        if dx is not None and op is F.linear and push.dtype == dx.dtype == w.dtype and push.is_contiguous():
            push.view(-1, push.shape[-1]).addmm_(dx.reshape(-1, dx.shape[-1]), w.t())  # in place, in one kernel
        elif dx is not None:
            push += op(dx, w, None, *rest, **more)
    return make_dual(y, push)


def _normalised(
    op: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, channels: tuple[int, ...]
) -> Tensor:
    """y = z(x) w + b, where z has a symmetric Jacobian and `op` maps (x, w, b) to y."""
    (x, dx), (w, dw), (b, db) = _parts(input), _parts(weight), _parts(bias)
    if dx is None or (w is not None and dw is None) or (b is not None and db is None):
        return op(input, weight, bias)
    y, at = op(x, w, b), x.detach().requires_grad_()
    with torch.enable_grad():
        z = op(at, None, None)
        (push,) = torch.autograd.grad(z, at, dx.detach().to(z.dtype))
    with torch.no_grad():
        if w is not None:
            moved = z * dw.view(channels) if db is None else torch.addcmul(db.view(channels), z, dw.view(channels))
            push = moved.addcmul_(push, w.view(channels))
    return make_dual(y, push.to(y.dtype))


def _relu(op: Any, input: Tensor, inplace: bool = False) -> Tensor:
    x, dx = unpack_dual(input)
    if dx is None or inplace:
        return op(input, inplace)
    y = op(x)
    with torch.no_grad():
        push = torch.ops.aten.threshold_backward(dx, y, 0)
    return make_dual(y, push)


def _batch_norm(
    op: Any,
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    (x, dx), (w, dw), (b, db) = _parts(input), _parts(weight), _parts(bias)
    channels, rest = (-1, *[1] * (input.ndim - 2)), (training, momentum, eps)
    if training or var is None or dw is None or db is None:
        return _normalised(lambda x, w, b: op(x, mean, var, w, b, *rest), input, weight, bias, channels)
    y = op(x, mean, var, w, b, *rest)
    with torch.no_grad():
        push = op(x, mean, var, dw, db, *rest)
        if dx is not None:
            push.addcmul_(dx, (w * (var + eps).rsqrt()).view(channels))
    return make_dual(y, push)


def _layer_norm(
    op: Any, input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    (x, dx), (w, dw), (b, db) = _parts(input), _parts(weight), _parts(bias)
    if dx is None or dw is None or (b is not None and db is None) or x.dtype != w.dtype:
        return _normalised(lambda x, w, b: op(x, shape, w, b, eps), input, weight, bias, tuple(shape))
    x, dx = x.contiguous(), dx.contiguous()  # once, where each of the kernels would
    y, mean, scale = torch.native_layer_norm(x, shape, w, b, eps)
    with torch.no_grad():
        push = op(x, shape, dw, db, eps)
        kernel, wanted = torch.ops.aten.native_layer_norm_backward, [True, False, False]
        push.addcmul_(kernel(dx, x, shape, mean, scale, None, None, wanted)[0], w)
    return make_dual(y, push)


def _group_norm(
    op: Any, input: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    (x, dx), (w, dw), (b, db) = _parts(input), _parts(weight), _parts(bias)
    channels = (-1, *[1] * (input.ndim - 2))
    if dx is None or dw is None or (b is not None and db is None) or x.dtype != w.dtype:
        return _normalised(lambda x, w, b: op(x, groups, w, b, eps), input, weight, bias, channels)
    x, dx = x.contiguous(), dx.contiguous()
    sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), groups)
    y, mean, scale = torch.native_group_norm(x, w, b, *sizes, eps)
    with torch.no_grad():
        push = op(x, groups, dw, db, eps)
        kernel, wanted = torch.ops.aten.native_group_norm_backward, [True, False, False]
        push.addcmul_(kernel(dx, x, mean, scale, None, *sizes, wanted)[0], w.view(channels))
    return make_dual(y, push)


def _attention(
    op: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **more: Any,
) -> Tensor:
    """softmax(q k^T scale) v: the value by the fused kernel, the push written out."""
    (q, dq), (k, dk), (v, dv), (mask, dmask) = _parts(query), _parts(key), _parts(value), _parts(attn_mask)
    if dq is None or dk is None or dv is None or dmask is not None or dropout_p or any(more.values()):
        return _with_math(op, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)
    y = op(q, k, v, mask, is_causal=is_causal, scale=scale)
    with torch.no_grad():
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        q, dq = (q * factor).contiguous(), (dq * factor).contiguous()
        k, dk = k.contiguous(), dk.contiguous()
        scores = q @ k.transpose(-2, -1)
        dscores = (dq @ k.transpose(-2, -1)).add_(q @ dk.transpose(-2, -1))
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores.add_(mask)
    scores.requires_grad_()
    with torch.enable_grad():
        p = scores.softmax(-1)
        (dp,) = torch.autograd.grad(p, scores, dscores.to(p.dtype))  # softmax has a symmetric Jacobian
    with torch.no_grad():
        push = (dp @ v).add_(p @ dv)
    return make_dual(y, push)


def _with_math(op: Any, *args: Any, **more: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return op(*args, **more)


RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d), _bilinear),
    F.relu: _relu,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _with_math,
}

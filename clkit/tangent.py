"""Linearised models: a network replaced by its first-order expansion in the weights around one frozen point.

f_lin(x; theta) = f(x; theta_0) + J(x; theta_0) (theta - theta_0), with J the Jacobian of the outputs in the weights.
f_lin is affine in theta: an average of linearised models' weights is the average of their outputs. First comes the
model, then the derivatives of common layers for its tangent pass, where torch's are slow or missing.
"""

import copy
import importlib
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, unpack_dual
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode

from clkit.modules import called, unwrapped
from clkit.weights import Weights, check_finite, check_same, live_tensors, set_weights


class Linearized(nn.Module):
    """A model linearised in its weights around theta_0 = `at` (default: its own); theta_0 is frozen, theta is trained.

    The parameters hold theta, not the displacement, under the model's own names, and start at the model's weights: to
    `get_weights`, `set_weights`, merges, optimizers and `run` this is a network like any other, and weights go to and
    fro between it and the model. The model is copied. Ref: Ortiz-Jimenez et al. 2023 (arXiv 2305.12827, section 3) and
    HCMM (arXiv 2509.23592).

    What the papers leave open, and what is done here. `network`, the copy at theta_0 that is expanded, is in evaluation
    mode whatever the mode of this module: no dropout, and BatchNorm with the statistics of theta_0. Those among the
    weights are there for their names; nothing updates or reads them, and `normalization.refresh` changes nothing. An
    optimizer's weight decay pulls theta towards 0, not towards theta_0.

    Gradients in theta are exact, to any order; a forward pass serves one backward pass. A training step is an ordinary
    one of `network` plus a tangent pass without a graph of its own (`rules`). The transforms of torch.func and
    torch.compile go through `torch.func.jvp`, which computes the same more slowly. Inputs get no gradient: with some
    layers (LayerNorm) torch's would be wrong.

    Raises TypeError for what is no module or is linearised already. Raises ValueError for a model without parameters,
    and for `at` that are not the model's or not finite.
    """

    network: nn.Module

    def __init__(self, model: nn.Module, at: Weights | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: {model!r} is no module; pass a network, for example models.mlp(stream)")
        model = unwrapped(model)
        if isinstance(model, Linearized):
            raise TypeError("model: it is linearised already; pass the network that it was made of")
        if not any(p.is_floating_point() for p in model.parameters()):
            raise ValueError(f"model: {type(model).__name__} has no parameters; there is nothing to linearise")
        if at is not None:
            check_same(live_tensors(model), at, names=("the model", "at"))
            check_finite(at, "at")
        network = copy.deepcopy(model).requires_grad_(False)
        network.eval()
        if at is not None:
            set_weights(network, at)
        self.__dict__["network"] = network  # no submodule: its tensors are not among the weights
        _mirror(model, self, {})

    def forward(self, x: Tensor) -> Tensor:
        """Prepared inputs to what the network puts out, as it takes them.

        Raises ValueError for inputs that want a gradient.
        """
        if torch.compiler.is_exporting():
            raise TypeError("model: a linearised model is no plain network; export or align its `network`")
        point = {name: p for name, p in self.network.named_parameters() if p.is_floating_point()}
        theta = {name: p for name, p in self.named_parameters() if name in point}
        grad = torch.is_grad_enabled()
        if grad and any(layer.requires_grad for layer in _layers(x)):
            raise ValueError("x: it wants a gradient, which a linearised model does not give; detach it")
        if torch.compiler.is_compiling() or any(len(_layers(t)) > 1 for t in (x, *theta.values())):
            return self._by_jvp(x, point, theta)
        _silence()
        trained = [name for name, p in theta.items() if grad and p.requires_grad]
        leaves = {name: point[name].detach().requires_grad_() for name in trained}
        with torch.no_grad():
            steps = {name: theta[name] - p for name, p in point.items()}
        with torch.set_grad_enabled(bool(trained)), dual_level():
            duals = {name: _dual(leaves.get(name, p), steps[name]) for name, p in point.items()}
            with Rules():
                out = called(self.network, duals, (x,))
            out, push = _parts(out)
        value = out.detach() if push is None else out.detach() + push.detach()
        graph = out, list(leaves.values())
        return _PullBack.apply(value, graph, *(theta[name] for name in trained)) if out.requires_grad else value

    def _by_jvp(self, x: Tensor, point: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """The definition, by torch's own rules."""
        if not torch.compiler.is_compiling():
            _silence()
        steps = {name: theta[name] - p for name, p in point.items()}
        # attention that has a forward-mode derivative; any mode keeps nn.MultiheadAttention from a shortcut without one
        with sdpa_kernel(SDPBackend.MATH), BaseTorchFunctionMode():
            pair = jvp(lambda p: functional_call(self.network, p, (x,)), (dict(point),), (steps,))
        return pair[0] + pair[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linearized":
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        return f"Linearized({self.network!r})"


def linearised(activation: Tensor) -> Tensor:
    """The linearised value of what a forward hook on a layer of `Linearized.network` is given, of the same shape.

    It has no gradient. Within a linearised model's pass without gradients a layer's output is h(x; theta_0) and,
    attached to it, the push J_h (theta - theta_0): this is their sum. Any other tensor is returned as it is.
    """
    at, push = unpack_dual(activation)
    return activation if push is None else (at + push).detach()


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that run in a model, as `named_modules` names them; in a linearised part, those of its network.

    The names of their parameters are those of the weights, theta, whose layers they are.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linearized):
            found |= {f"{name}.{n}".strip("."): m for n, m in module.network.named_modules()}
        else:
            found.setdefault(name, module)
    return found


class _PullBack(torch.autograd.Function):
    """Gives a value the gradients J(theta_0)^T g in theta, from the graph of the network at theta_0."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, graph: tuple[Tensor, list[Tensor]], *theta: Tensor) -> Tensor:
        ctx.graph = graph
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        out, leaves = ctx.graph
        again = torch.is_grad_enabled()
        return None, None, *torch.autograd.grad(out, leaves, grads, create_graph=again, allow_unused=True)


def _mirror(module: nn.Module, into: nn.Module, made: dict[int, Any]) -> None:
    """Gives `into` copies of a module's parameters and buffers, under the same names, in modules that do nothing."""
    for name, p in module._parameters.items():
        if p is not None and id(p) not in made:
            made[id(p)] = nn.Parameter(p.detach().clone(), p.requires_grad)
        into.register_parameter(name, None if p is None else made[id(p)])
    for name, b in module._buffers.items():
        persistent = name not in module._non_persistent_buffers_set
        into.register_buffer(name, None if b is None else b.detach().clone(), persistent=persistent)
    for name, child in module._modules.items():
        if child is not None and id(child) not in made:
            made[id(child)] = nn.Module()
            _mirror(child, made[id(child)], made)
        into.add_module(name, None if child is None else made[id(child)])


def _layers(tensor: Tensor) -> list[Tensor]:
    """A tensor and what it wraps: more than one where a transform of torch.func is at work on it."""
    layers = [tensor]
    if not torch.compiler.is_compiling():  # which cannot follow, and need not: it never meets a wrapped tensor
        while (inner := torch.func.debug_unwrap(layers[-1], recurse=False)) is not layers[-1]:
            layers.append(inner)
    return layers


@cache
def _silence() -> None:
    """Loads what torch's forward mode loads at first use, without the deprecation warning that torch gives itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


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


# torch has one level of forward mode; what its public functions do around these takes a tenth of a small network's step
_dual = partial(torch._make_dual, level=0)  # pyright: ignore


def _parts(tensor: Tensor | None) -> tuple[Any, Any]:
    return (None, None) if tensor is None else torch._unpack_dual(tensor, level=0)  # pyright: ignore


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
    return _dual(y, push)


def _normalised(
    op: Any, input: Tensor, weight: Any, bias: Any, channels: tuple[int, ...], kernels: Any = None
) -> Tensor:
    """y = z(x) w + b, where z has a symmetric Jacobian and `op` maps (x, w, b) to y.

    `kernels` are torch's own: (x, w, b) to y and the moments of x, and (dx, x, moments) to the push of z.
    """
    (x, dx), (w, dw), (b, db) = _parts(input), _parts(weight), _parts(bias)
    if dx is None or (w is not None and dw is None) or (b is not None and db is None):
        return op(input, weight, bias)
    if kernels is not None and w is not None and x.dtype == w.dtype:
        x, dx = x.contiguous(), dx.contiguous()  # once, where each of the kernels would
        y, *moments = kernels[0](x, w, b)
        with torch.no_grad():
            push = op(x, dw, db).addcmul_(kernels[1](dx, x, *moments), w.view(channels))
        return _dual(y, push)
    y, at = op(x, w, b), x.detach().requires_grad_()
    with torch.enable_grad():
        z = op(at, None, None)
        (push,) = torch.autograd.grad(z, at, dx.detach().to(z.dtype))
    with torch.no_grad():
        if w is not None:
            moved = z * dw.view(channels) if db is None else torch.addcmul(db.view(channels), z, dw.view(channels))
            push = moved.addcmul_(push, w.view(channels))
    return _dual(y, push.to(y.dtype))


def _relu(op: Any, input: Tensor, inplace: bool = False) -> Tensor:
    x, dx = _parts(input)
    if dx is None or inplace:
        return op(input, inplace)
    y = op(x)
    with torch.no_grad():
        push = torch.ops.aten.threshold_backward(dx, y, 0)
    return _dual(y, push)


def _batch_norm(
    op: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    (x, dx), (w, dw), (b, db) = _parts(input), _parts(weight), _parts(bias)
    channels, rest = (-1, *[1] * (input.ndim - 2)), (training, momentum, eps)
    if training or running_var is None or dw is None or db is None:
        return _normalised(lambda x, w, b: op(x, running_mean, running_var, w, b, *rest), input, weight, bias, channels)
    y = op(x, running_mean, running_var, w, b, *rest)
    with torch.no_grad():
        push = op(x, running_mean, running_var, dw, db, *rest)
        if dx is not None:
            push.addcmul_(dx, (w * (running_var + eps).rsqrt()).view(channels))
    return _dual(y, push)


def _layer_norm(
    op: Any, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    shape, back = tuple(normalized_shape), torch.ops.aten.native_layer_norm_backward
    kernels = (
        lambda x, w, b: torch.native_layer_norm(x, shape, w, b, eps),
        lambda dx, x, mean, scale: back(dx, x, shape, mean, scale, None, None, [True, False, False])[0],
    )
    return _normalised(lambda x, w, b: op(x, shape, w, b, eps), input, weight, bias, shape, kernels)


def _group_norm(
    op: Any, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    sizes = (input.shape[0], input.shape[1], input.shape[2:].numel(), num_groups)
    channels, back = (-1, *[1] * (input.ndim - 2)), torch.ops.aten.native_group_norm_backward
    kernels = (
        lambda x, w, b: torch.native_group_norm(x, w, b, *sizes, eps),
        lambda dx, x, mean, scale: back(dx, x, mean, scale, None, *sizes, [True, False, False])[0],
    )
    return _normalised(lambda x, w, b: op(x, num_groups, w, b, eps), input, weight, bias, channels, kernels)


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
    (q, dq), (k, dk), (v, dv), (mask, dmask) = map(_parts, (query, key, value, attn_mask))
    if dq is None or dk is None or dv is None or dmask is not None or dropout_p or any(more.values()):
        return _with_math(op, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)
    y = op(q, k, v, mask, is_causal=is_causal, scale=scale)
    with torch.no_grad():
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        q, dq, k, dk = (t.contiguous() for t in (q * factor, dq * factor, k, dk))
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
    return _dual(y, push)


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

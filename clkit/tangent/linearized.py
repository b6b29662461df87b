"""The linearised model, and its layers."""

import copy
import importlib
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode

from clkit.tangent.rules import Rules
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

    Raises TypeError for what is no module or is linearised already, and ValueError for a model without parameters and
    for `at` that are not the model's or not finite.
    """

    network: nn.Module

    def __init__(self, model: nn.Module, at: Weights | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: {model!r} is no module; pass a network, for example models.mlp(stream)")
        if isinstance(model, Linearized):
            raise TypeError("model: it is linearised already; pass the network that it was made of")
        if not any(p.is_floating_point() for p in model.parameters()):
            raise ValueError(f"model: {type(model).__name__} has no parameters; there is nothing to linearise")
        if at is not None:
            check_same(live_tensors(model), at, names=("the model", "at"))
            check_finite(at, "at")
        network = copy.deepcopy(model).eval().requires_grad_(False)
        if at is not None:
            set_weights(network, at)
        self.__dict__["network"] = network  # no submodule: its tensors are not among the weights
        _mirror(model, self, {})

    def forward(self, x: Tensor) -> Tensor:
        """Prepared inputs to what the network puts out, as it takes them.

        Raises ValueError for inputs that want a gradient.
        """
        if torch.compiler.is_exporting():
            raise TypeError(
                "model: a linearised model is not exported, and its units cannot be permuted without its point of "
                "expansion; export or align its `network`"
            )
        point = {name: p for name, p in self.network.named_parameters() if p.is_floating_point()}
        theta = {name: p for name, p in self.named_parameters() if name in point}
        grad = torch.is_grad_enabled()
        if grad and any(layer.requires_grad for layer in _layers(x)):
            raise ValueError(
                "x: it wants a gradient, which a linearised model does not give; detach it, or linearise what precedes "
                "together with the model"
            )
        if torch.compiler.is_compiling() or any(len(_layers(t)) > 1 for t in (x, *theta.values())):
            return self._by_jvp(x, point, theta)
        _silence()
        trained = [name for name, p in theta.items() if grad and p.requires_grad]
        leaves = {name: point[name].detach().requires_grad_() for name in trained}
        with torch.no_grad():
            steps = {name: theta[name] - p for name, p in point.items()}
        with torch.set_grad_enabled(bool(trained)), dual_level():
            duals = {name: make_dual(leaves.get(name, p), steps[name]) for name, p in point.items()}
            with Rules():
                out = functional_call(self.network, duals, (x,))
            out, push = unpack_dual(out)
        value = out.detach() if push is None else out.detach() + push.detach()
        if not out.requires_grad:
            return value
        return _PullBack.apply(value, (out, list(leaves.values())), *(theta[name] for name in trained))

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


def value(activation: Tensor) -> Tensor:
    """The linearised value of what a forward hook on a layer of `Linearized.network` is given, without a gradient.

    Within a linearised model's pass without gradients a layer's output is h(x; theta_0) and, attached to it, the push
    J_h (theta - theta_0): this is their sum. Any other tensor is returned as it is.
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

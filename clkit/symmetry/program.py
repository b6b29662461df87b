"""A model as a graph of operations (`torch.export`) that runs on any weights and shows every value on the way."""

import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.backends import cudnn, mkldnn
from torch.export import ExportedProgram
from torch.func import functionalize
from torch.fx import GraphModule, Interpreter, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from clkit.modules import evaluation_mode
from clkit.weights import Weights, live_tensors

aten = torch.ops.aten


@dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A traced model: its graph, the weight each placeholder reads, and the constants of the others."""

    module: GraphModule
    sources: dict[str, str]  # placeholder -> name of a weight
    constants: dict[str, Tensor]  # placeholder -> value
    inputs: tuple[str, ...]
    buffers: frozenset[str]
    batch: int | None  # the one batch size it runs on, None for any
    device: torch.device

    @property
    def used(self) -> set[str]:
        """The weights that some operation reads."""
        return set(self.sources.values())

    def run(self, nets: Sequence[Weights], x: Tensor, look: Callable[[str, list[Any]], None]) -> None:
        """Runs several networks side by side; `look(node, values)` sees each result as soon as it is there."""
        fixed = [self.constants | {place: w[name] for place, name in self.sources.items()} for w in nets]
        values: dict[Node, list[Any]] = {}
        for node, last in self._steps:
            if node.op == "placeholder":
                values[node] = [f.get(node.name, x) for f in fixed]
            elif node.op == "get_attr":
                values[node] = [operator.attrgetter(str(node.target))(self.module)] * len(nets)
            elif callable(node.target) and node.target is not aten.copy_.default:
                values[node] = [
                    node.target(*_fill(node.args, values, k), **_fill(node.kwargs, values, k)) for k in range(len(nets))
                ]
                look(node.name, values[node])
            for done in last:
                del values[done]

    @cached_property
    def _steps(self) -> list[tuple[Node, list[Node]]]:
        """The nodes in order, each with the values that nobody needs after it."""
        final = {used: node for node in self.module.graph.nodes for used in node.all_input_nodes}
        last: dict[Node, list[Node]] = {node: [] for node in self.module.graph.nodes}
        for used, node in final.items():
            last[node].append(used)
        return list(last.items())


def _fill(arguments: Any, values: Mapping[Node, list[Any]], k: int) -> Any:
    return map_arg(arguments, lambda node: values[node][k])


def trace(model: nn.Module, example: Any, training: bool = False, once: bool = False) -> Program:
    """Traces a model on an example in evaluation mode, for any batch size if it allows; it stays as it is.

    The graph has core ATen operations. They write nothing in place, but for the last ones, which copy to placeholders.
    Elementwise ones, stacking and `WHOLE` stay, for they are faster so. `training` traces the training mode.

    Tries go on until one succeeds: for any batch size, then for the example's. A batch of one would be traced as if it
    always were one, so both tries are first made with a batch of two; but not with `once`. Raises ValueError naming the
    module that `torch.export` cannot follow in the last two tries.
    """
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    with mode(model, training), warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # export prints its graph
        warnings.simplefilter("ignore")
        exported, module = _exported(model, once, *arguments(example))
    names = {_place(tensor): name for name, tensor in live_tensors(model).items()}
    held = {**exported.constants, **exported.state_dict}
    sources, constants, inputs = {}, {}, []
    places = module.graph.find_nodes(op="placeholder")
    for node, spec in zip(places, exported.graph_signature.input_specs, strict=True):
        if not isinstance(node.meta.get("val"), Tensor):
            module.graph.erase_node(node)  # numbers and the like are constants of the graph
        elif spec.target is None:
            inputs.append(node)
        elif name := names.get(_place(held[spec.target])):
            sources |= {node.name: name} if node.users else {}
        else:
            constants[node.name] = held[spec.target]
    sizes = [n.meta["val"].shape[0] for n in inputs[:1] if n.meta["val"].ndim]
    return Program(
        module,
        sources,
        constants,
        tuple(node.name for node in inputs),
        frozenset(name for b in model.buffers() if (name := names.get(_place(b)))),
        next((int(size) for size in sizes if is_concrete_int(size)), None),
        next((n.meta["val"].device for n in inputs), torch.device("cpu")),
    )


def arguments(example: Any) -> tuple[tuple, dict[str, Any]]:
    """What a model is called with: a tuple holds arguments in order, a mapping arguments by name, all else is one."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def batched(value: Any) -> bool:
    """Whether it is a tensor with a first dimension."""
    return isinstance(value, Tensor) and value.ndim > 0


def single(example: Any) -> bool:
    """Whether all tensors of an example have length one: a batch of one, or no batch."""
    return all(len(t) == 1 for t in tree_leaves(example) if batched(t))


def _exported(model: nn.Module, once: bool, *example: Any) -> tuple[ExportedProgram, GraphModule]:
    """What `torch.export` gives, and its graph in core operations; see `trace` for the order of tries."""
    if not all(t.numel() for t in tree_leaves(example)[:1] if isinstance(t, Tensor)):
        raise ValueError("example: its first tensor has no elements; pass a row or more")
    double = single(example) and not once
    twice = [tree_map(lambda t: torch.cat([t, t]) if batched(t) else t, example)] if double else []
    errors = []
    for call, free in product([*twice, example], (True, False)):
        # an export that fails leaves marks on the tensors, with which a second one would fail alike
        args, kwargs = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, call)
        sizes = torch.export.ShapesCollection()
        for t in filter(batched, tree_leaves((args, kwargs)) if free else ()):
            sizes[t] = {0: torch.export.Dim.AUTO}
        try:
            with torch.no_grad():  # else a model's own no_grad becomes a graph in the graph
                exported = torch.export.export(model, args, kwargs, dynamic_shapes=sizes, strict=False)
                return exported, _lowered(exported)
        except Exception as error:
            errors.append(error)
    raise ValueError(_untraceable(model, errors[-2:])) from errors[-1]


def _stand_in(operation: Any) -> Any:
    """An operation that nothing takes to pieces while a graph is traced, where another one would be."""
    name, _, schema = str(operation._schema).removeprefix("aten::").partition("(")
    if not hasattr(torch.ops.clkit, name):  # this file may be loaded again
        torch.library.define(f"clkit::{name}", f"({schema}")
        torch.library.register_fake(f"clkit::{name}")(operation)
    return getattr(torch.ops.clkit, name).default


POOLING = aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d
WHOLE = {some.default: _stand_in(some.default) for some in (*POOLING, aten.scaled_dot_product_attention)}
DROPOUTS = {
    getattr(aten, name + place).default
    for name, place in product(("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"), ("", "_"))
}


class _Whole(Interpreter):
    """Runs a graph with stand-ins, dropout as one operation, and linear layers on rows: else they bind a batch size."""

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if target is aten.linear.default and args[0].ndim > 2:
            return target(args[0].flatten(0, -2), *args[1:]).unflatten(0, args[0].shape[:-1])
        if target in DROPOUTS:  # else its mask is drawn by itself, and looks like a constant
            return aten.native_dropout.default(*args)[0]
        return super().call_function(WHOLE.get(target, target), args, kwargs)


def _lowered(exported: ExportedProgram) -> GraphModule:
    """The graph in core operations."""
    values = [node.meta.get("val") for node in exported.graph.find_nodes(op="placeholder")]
    fake = detect_fake_mode(values) or nullcontext()
    with fake, enable_python_dispatcher(), cudnn.flags(enabled=False), mkldnn.flags(enabled=False):
        module = make_fx(functionalize(_Whole(exported.graph_module).run), _decompositions())(*values)
    module.graph.eliminate_dead_code()
    meant = {other: operation for operation, other in WHOLE.items()}
    for node in module.graph.nodes:
        node.target = meant.get(node.target, node.target)
    return module


@cache
def _decompositions() -> dict[Any, Callable]:
    """The decompositions to core operations, without those of elementwise ones and of stacking."""
    return {
        operation: way
        for operation, way in torch.export.default_decompositions().items()
        if operation is not aten.stack.default and torch.Tag.pointwise not in getattr(operation, "tags", ())
    }


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts a model in evaluation or training mode, without fused attention, and back as it was."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    quiet = logging.root.manager.disable
    try:
        logging.disable(max(quiet, logging.ERROR))  # a trace that fails is reported by an exception
        with evaluation_mode(model):  # which gives every module its own mode back
            model.train().train(training)  # the first drops what some models keep while they evaluate
            yield
    finally:
        logging.disable(quiet)
        torch.backends.mha.set_fastpath_enabled(fast)


def base_name(node: Node) -> str:
    """An operation's ATen name without its overload."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _untraceable(model: nn.Module, errors: Sequence[Exception]) -> str:
    first, *others = dict.fromkeys(_blamed(model, error) for error in errors)
    remedy = (
        "write that forward without branches on the values of tensors, call it so that it gives tensors alone "
        "(use_cache=False), or align the part of the model before it"
    )
    lines = [f"With the example's sizes alone it cannot follow {other}" for other in others]
    return "\n".join([f"model: torch.export cannot follow {first}; {remedy}", *lines])


def _blamed(model: nn.Module, error: Exception) -> str:
    names = {module: name for name, module in model.named_modules()}
    where = type(model).__name__
    for frame, line in walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names and frame.f_code.co_name == "forward":
            where = f"{names[owner] or 'the model'} ({type(owner).__name__}.forward, line {line})"
    return f"{where}: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"

"""A model as a graph of operations (`torch.export`) that runs on any weights and shows every value on the way."""

import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.utils._pytree import tree_leaves, tree_map

from clkit.modules import evaluation_mode
from clkit.weights import Weights, live_tensors

VIEWS = frozenset(
    "alias as_strided chunk contiguous detach diagonal expand expand_as flatten mT narrow numpy_T permute reshape "
    "select slice split split_with_sizes squeeze t transpose unbind unflatten unsqueeze view view_as".split()
)


@dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A traced model: its graph, the weight each placeholder reads, and the constants of the others."""

    module: GraphModule
    sources: dict[str, str]  # placeholder -> name of a weight
    constants: dict[str, Tensor]  # placeholder -> value
    inputs: tuple[str, ...]
    written: dict[str, str]  # output -> the buffer that it replaces
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
                given = [f.get(node.name, x) for f in fixed]
                values[node] = [t.clone() for t in given] if node in self._overwritten else given
            elif node.op == "get_attr":
                values[node] = [operator.attrgetter(str(node.target))(self.module)] * len(nets)
            elif callable(node.target):
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

    @cached_property
    def _overwritten(self) -> set[Node]:
        return {owner for node in self.module.graph.nodes if mutates(node) for owner in owners(node)}


def _fill(arguments: Any, values: Mapping[Node, list[Any]], k: int) -> Any:
    return map_arg(arguments, lambda node: values[node][k])


def trace(model: nn.Module, example: Any, training: bool = False, functional: bool = False) -> Program:
    """Traces a model on an example in evaluation mode, for any batch size if it allows; it stays as it is.

    `training` traces the training mode; `functional` rewrites operations that work in place. Raises ValueError naming
    the module that `torch.export` cannot follow.
    """
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    with mode(model, training), warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # export prints its graph
        warnings.simplefilter("ignore")
        exported = _exported(model, *arguments(example))
        if functional or any(map(_open, exported.graph.nodes)):
            exported = exported.run_decompositions({})
    names = {_place(tensor): name for name, tensor in live_tensors(model).items()}
    signature = exported.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    targets |= signature.inputs_to_lifted_tensor_constants
    held = {**exported.constants, **exported.state_dict}
    found = {place: names.get(_place(held[target])) for place, target in targets.items()}
    constants = {place: held[targets[place]] for place, name in found.items() if name is None}
    written = {out: names.get(_place(held[target])) for out, target in signature.buffers_to_mutate.items()}
    module = exported.graph_module
    if any(map(_open, module.graph.nodes)):
        _settle(module.graph, constants)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    inputs = [n for n in placeholders if n.name in signature.user_inputs and isinstance(n.meta.get("val"), Tensor)]
    for node in placeholders:
        if not node.users:  # numbers and the like are constants of the graph
            module.graph.erase_node(node)
    sizes = [n.meta["val"].shape[0] for n in inputs[:1] if n.meta["val"].ndim]
    return Program(
        module,
        {n.name: name for n in placeholders if n.users and (name := found.get(n.name))},
        constants,
        tuple(n.name for n in inputs),
        {out: name for out, name in written.items() if name},
        frozenset(name for b in model.buffers() if (name := names.get(_place(b)))),
        next((int(size) for size in sizes if is_concrete_int(size)), None),
        next((n.meta["val"].device for n in inputs), torch.device("cpu")),
    )


def _open(node: Node) -> bool:
    """Does the size of a node's value depend on numbers?"""
    value = node.meta.get("val")
    shape = value.shape if isinstance(value, Tensor) else ()
    return any(isinstance(n, torch.SymInt) and n.node.hint is None for n in shape)


def _settle(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Gives numbers to sizes that depend on constants alone, as of what is picked by boolean masks of the model's own.

    What picks becomes a constant: of a mask the indices of its elements. The graph must not work in place.
    """
    known: dict[Any, Any] = {n: constants[n.name] for n in graph.nodes if n.name in constants}

    def placed(value: Tensor) -> Node:
        place = graph.placeholder("picked")
        place.meta["val"] = constants[place.name] = known[place] = value
        return place

    calls: list[Any] = [n for n in graph.nodes if n.op == "call_function"]
    for node in calls:
        first, sizes, random = 0, (), torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if known.keys() >= set(node.all_input_nodes) and not random:
            known[node] = node.target(*map_arg(node.args, known.get), **map_arg(node.kwargs, known.get))
            sizes = getattr(known[node], "shape", ())
        elif base_name(node) == "index" and known.keys() >= {i for i in node.args[1] if i}:
            picks = []
            with graph.inserting_before(node):
                for index in node.args[1]:
                    values = [known[index]] if index else []
                    if values and values[0].dtype == torch.bool:
                        values = values[0].nonzero(as_tuple=True)
                    picks += map(placed, values) if index else [None]
            node.update_arg(1, picks)
            places = [k for k, pick in enumerate(picks) if pick]
            first = places[0] if places[-1] - places[0] < len(places) else 0  # else torch puts them in front
            sizes = torch.broadcast_shapes(*(known[picks[k]].shape for k in places))
        for n, size in zip(node.meta["val"].shape[first:] if sizes else (), sizes, strict=False):
            torch._check(n == size)


def arguments(example: Any) -> tuple[tuple, dict[str, Any]]:
    """What a model is called with: a tuple holds arguments in order, a mapping arguments by name, all else is one."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def _exported(model: nn.Module, *example: Any) -> torch.export.ExportedProgram:
    """Exports with any batch size, else with that of the example; a batch of one is first tried as two.

    It would be traced as if it always were one; where all tensors have length one and the model takes no other, it is.
    """

    def batched(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0

    alone = all(len(t) == 1 for t in tree_leaves(example) if batched(t))
    twice = [tree_map(lambda t: torch.cat([t, t]) if batched(t) else t, example)] if alone else []
    errors = []
    for call, free in product([*twice, example], (True, False)):
        # an export that fails leaves marks on the tensors, with which a second one would fail alike
        args, kwargs = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, call)
        sizes = torch.export.ShapesCollection()
        for t in filter(batched, tree_leaves((args, kwargs)) if free else ()):
            sizes[t] = {0: torch.export.Dim.AUTO}
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=sizes, strict=False)
        except Exception as error:
            errors.append(error)
    raise ValueError(_untraceable(model, errors[-2:])) from errors[-1]


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts a model in evaluation or training mode, without fused attention, and back as it was."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    quiet = logging.root.manager.disable
    try:
        logging.disable(max(quiet, logging.ERROR))  # a trace that fails is reported by an exception
        with evaluation_mode(model):  # which gives every module its own mode back
            model.train(training)
            yield
    finally:
        logging.disable(quiet)
        torch.backends.mha.set_fastpath_enabled(fast)


def base_name(node: Node) -> str:
    """An operation's ATen name without overload and without the underscore of its in-place form."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2].rstrip("_")
    return getattr(node.target, "__name__", str(node.target))


def mutates(node: Node) -> bool:
    """Does an operation change its first operand in place?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def owners(node: Node) -> list[Node]:
    """A node and those whose memory its value may share: what it is a view of, up to the tensor that owns it."""
    chain = [node]
    while node.op == "call_function" and node.all_input_nodes and (base_name(node) in VIEWS or mutates(node)):
        node = node.all_input_nodes[0]
        chain.append(node)
    return chain


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

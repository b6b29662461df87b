"""Modules as people bring them: in wrappers, and with frozen parts; how they are put in a mode and listened to."""

import copy
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

TURN = threading.RLock()  # held by what seeds torch's generators or sets its flags, which all threads share
FROZEN = "_names_of_frozen_modules"
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without wrappers, around it or within: those of `torch.compile`, DataParallel and AveragedModel.

    All tensors are shared. Of the modules, those with a wrapper within are copies; a model without any is returned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {model!r:.80} is a {type(model).__name__}; pass an nn.Module")
    inner = model._modules.get("module" if isinstance(model, WRAPPERS) else "_orig_mod")
    if inner is not None:
        return unwrapped(inner)
    plain = {name: child if child is None else unwrapped(child) for name, child in model._modules.items()}
    if all(plain[name] is child for name, child in model._modules.items()):
        return model
    model = copy.copy(model)
    model._modules = plain
    return model


def called(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Any, named: dict[str, Any] | None = None) -> Any:
    """What a model gives with `tensors` in place of its own, and of those that these are tied to.

    It is torch's functional_call, which leaves its tensors behind in a module that has two names: each is put in once.
    """
    places = {
        f"{part}.{name}".strip("."): id(tensor)
        for part, module in model.named_modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }
    tied = {places[name]: tensor for name, tensor in tensors.items() if name in places}
    every = {name: tied[place] for name, place in places.items() if place in tied}
    return functional_call(model, {**every, **tensors}, inputs, named, tie_weights=False)


def side_pass(model: nn.Module, x: Tensor) -> Tensor:
    """What `model` gives for prepared inputs (N, ...) in the mode it is in, its buffers left as they are.

    Logits (N, C), or (N, L, C) for tokens, with gradients.
    """
    model = unwrapped(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return called(model, buffers, (x,))


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """That of a model's first floating parameter, in which it takes its inputs; None where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def frozen_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that stay in evaluation mode while the model is trained: the rule for all of clkit.

    They are those in evaluation mode within a model in training mode. A model that is itself in evaluation mode, as
    most code leaves one, is trained as a whole but for modules whose parameters are all frozen, and what is within
    them. If there is nothing else, nothing is frozen: the model is no part of another. What `scratch_copy` gives has
    the frozen modules of the original.
    """
    if (names := vars(model).get(FROZEN)) is not None:
        return {model.get_submodule(name) for name in names}
    if model.training:
        return {m for m in model.modules() if not m.training}
    frozen = [m for m in model.modules() if any(True for _ in m.parameters()) and not _trained(m)]
    return {inner for m in frozen for inner in m.modules()} if _trained(model) else set()


def scratch_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, to try weights in, that knows which modules of the original are frozen."""
    frozen, scratch = frozen_modules(model), copy.deepcopy(model)
    scratch.eval()
    vars(scratch)[FROZEN] = [name for name, m in model.named_modules() if m in frozen]
    return scratch


def training_mode(model: nn.Module, frozen: Iterable[nn.Module]) -> None:
    """Puts a model in training mode, but for its frozen modules."""
    model.train()
    for module in frozen:
        module.training = False


def frozen_tensors(model: nn.Module) -> set[str]:
    """The names of what neither training nor a merge moves: frozen parameters, and buffers of frozen modules.

    None in a model that is frozen as a whole.
    """
    frozen = frozen_modules(model)
    names = {name for name, p in model.named_parameters() if not p.requires_grad} if _trained(model) else set()
    return names | {f"{name}.{b}".strip(".") for name, m in model.named_modules() if m in frozen for b in m._buffers}


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode and gives every module's training flag back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]], *, before: bool = False) -> Iterator[None]:
    """Calls each module's own hook whenever the module runs, as torch calls forward hooks, and takes all away again.

    A hook is called as `hook(module, inputs, output)`, with `before` as `hook(module, inputs)` before the module runs.
    What it returns, if not None, takes the place of the output (or of the inputs).
    """
    with ExitStack() as stack:
        for module, hook in hooks:
            add = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.enter_context(add(hook))
        if "torch._dynamo" in sys.modules:  # compiled code does not call hooks that come later
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield

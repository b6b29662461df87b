"""What is tried before the first task is trained, on two of its rows: all that a run will need of a network."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clkit import checks
from clkit.consolidation import Merged
from clkit.data import Batch, Stream, Task
from clkit.evaluation import check_width
from clkit.learners import Criterion, Learner
from clkit.modules import evaluation_mode, side_pass, unwrapped
from clkit.training import computing
from clkit.training.settings import Training
from clkit.weights import Weights, check_finite, check_same, get_weights

ROWS_AT_ONCE = 4096


def check_arguments(model: Any, learner: Any, consolidation: Any, training: Any) -> None:
    """Raises on arguments of the wrong kind, or that do not fit together, before any work starts."""
    scripted = isinstance(model, nn.Module) and any(isinstance(m, torch.jit.ScriptModule) for m in model.modules())
    due = callable(getattr(consolidation, "due", None)) and callable(consolidation)
    for name, given, fits, wanted in (
        ("model", model, callable(model) and not scripted, "a module, or a factory such as models.convnet, unscripted"),
        ("learner", learner, isinstance(learner, Learner), "a learner, for example ER(memory=50)"),
        ("consolidation", consolidation, due and not isinstance(consolidation, type), "one such as CLeWI(alpha=0.3)"),
        ("training", training, isinstance(training, Training), "a Training, for example Training(epochs=10, lr=0.1)"),
    ):
        if not fits:
            raise TypeError(f"{name}: {given!r:.80} ({type(given).__name__}); give {wanted}")
    if getattr(consolidation, "uses_moments", False) and training.optimizer != "adamw":
        remedy = 'use Training(optimizer="adamw"), or importance="fisher"'
        raise ValueError(f"optimizer: {training.optimizer!r} keeps no second moments for {consolidation!r}; {remedy}")


def made(model: Any, stream: Stream, seed: int, device: torch.device) -> nn.Module:
    """A copy of a module, or what a factory makes, without wrappers and on the device.

    Raises TypeError for a module that cannot be copied and for a factory that takes or gives something else. Raises
    ValueError for weights that are not finite.
    """
    if isinstance(model, nn.Module):
        with checks.explained(
            f"model: {type(model).__name__} cannot be copied", "give a factory of it", kind=TypeError
        ):
            net = copy.deepcopy(unwrapped(model))
    else:
        what = "model: the factory cannot be called as model(stream, seed=seed)"
        with checks.explained(what, "let it take both", of=TypeError, kind=TypeError):
            inspect.signature(model, follow_wrapped=False).bind(stream, seed=seed)
        net = model(stream, seed=seed)
        if not isinstance(net, nn.Module):
            raise TypeError(f"model: the factory gave {net!r:.80} ({type(net).__name__}); let it return a module")
        net = unwrapped(net)
    check_finite(get_weights(net), "model")
    if any(tensor.device != device for tensor in (*net.parameters(), *net.buffers())):
        try:
            net.to(device)
        except TypeError:  # a module's own `to` may take something else
            nn.Module.to(net, device)
    return net


def check_inputs(stream: Stream) -> None:
    """Raises ValueError that names part and task if inputs hold a NaN or an infinity."""
    for task in stream:
        for part, x in (("train", task.train.x), ("test", task.test.x)):
            if x.is_floating_point() or x.is_complex():
                good = torch.cat([rows.flatten(1).isfinite().all(1) for rows in x.split(ROWS_AT_ONCE)])
                if not good.all():
                    first = int((~good).nonzero()[0])
                    where = f"{part} rows of task {task.index} ({task.name!r})"
                    bad = f"{int((~good).sum())} of {len(x)} {where}"
                    raise ValueError(f"stream: {bad} hold a NaN or an infinity, row {first} the first; mend these rows")


def attempt(loop: Any) -> None:
    """Tries the network of a loop that is about to begin, its learner and its consolidation on two rows.

    The model is as it was afterwards, but that outputs for more classes than the stream has are cut off from now on.
    Where nobody asks for a memory format and the network fails in the loop's, that becomes the usual one. Raises
    ValueError, TypeError or FloatingPointError that names what does not fit.
    """
    if loop.layout:
        try:
            check_network(loop, loop.layout)
        except ValueError:
            if loop.training.channels_last:
                raise
            loop.layout = None
            for model in {loop.model, loop.scratch} if loop.device.type != "cpu" else ():
                computing.lay_out(model, torch.contiguous_format)
    some = check_network(loop, None)
    loop.learner.check(loop.scratch, some.x)
    if len(loop.stream) > 1:
        check_consolidation(loop.consolidation, loop.scratch, some.x, lambda: loop.symmetry)


def check_network(loop: Any, layout: torch.memory_format | None) -> Batch:
    """Tries the network of a loop on rows in a memory format, as tests and steps give them, and returns two."""
    stream, task = loop.stream, loop.stream[0]
    some, one = (task.batch(slice(0, count), device=loop.device, layout=layout) for count in (2, 1))
    tested = one if any(len(task.test) == 1 for task in stream) else some
    if check_outputs(loop.model, tested, len(stream.classes)) > len(stream.classes):
        for model in {loop.model, loop.scratch}:
            model.register_forward_hook(partial(_cut, len(stream.classes)))
    trained = one if loop.training.batch == 1 or any(len(task.train) == 1 for task in stream) else some
    check_step(loop.model, trained, loop.criterion)
    return some


def check_outputs(model: nn.Module, batch: Batch, classes: int) -> int:
    """How many outputs a model has; raises unless it gives finite logits for every class in evaluation mode."""
    with torch.no_grad(), evaluation_mode(model):
        with _tried("in evaluation mode", batch):
            logits = model(batch.x)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"model: it returns a {type(logits).__name__}; give a module that returns logits alone, a tensor"
        )
    wanted = tuple(batch.y.shape)
    if tuple(logits.shape[:-1]) != wanted or not logits.is_floating_point():
        shapes = f"{tuple(logits.shape)} {logits.dtype} for inputs {tuple(batch.x.shape)}"
        remedy = f"give floating logits of shape ({', '.join(map(str, wanted))}, classes)"
        raise ValueError(f"model: it returns {shapes}; {remedy}")
    check_width(logits, classes)
    if not logits.isfinite().all():
        remedy = "look for statistics that were never estimated, or numbers that overflow"
        raise FloatingPointError(f"model: its logits in evaluation mode are not finite before any training; {remedy}")
    return logits.shape[-1]


def check_step(model: nn.Module, batch: Batch, criterion: Criterion) -> None:
    """Raises ValueError unless the model in the mode it is in takes rows like a step's, and gives gradients."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    with _tried("in training mode", batch):
        loss = criterion(side_pass(model, batch.x), batch.y)
        torch.autograd.grad(loss, wanted, allow_unused=True)


def check_consolidation(rule: Any, model: nn.Module, x: Tensor, symmetry: Callable[[], Any]) -> None:
    """Asks a consolidation whether the network suits it; `symmetry` derives what it permutes by, if it does."""
    if (check := getattr(rule, "check", None)) is not None:
        check(model, x)
    if getattr(rule, "uses_symmetry", False):
        what = f"model: units of {type(model).__name__} cannot be permuted, as {rule!r} does"
        with checks.explained(what, "use align=None"):
            symmetry()


def checked(merged: Any, current: Weights, rule: Any) -> Merged:
    """What a consolidation returned. Raises TypeError if it is no Merged, ValueError for other weights' names."""
    if not isinstance(merged, Merged):
        raise TypeError(f"consolidation: {rule!r} returned {merged!r:.80}; let it return a Merged")
    for name, weights in (("train", merged.train), ("deploy", merged.deploy)):
        if weights is not current:
            check_same(current, weights, names=("the model", f"consolidation: {name} of {rule!r}"))
    return merged


def check_loss(loss: Any, learner: Learner) -> None:
    """Raises TypeError for what no step can go down along."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"learner: the loss of {learner!r:.80} is {what}; give a tensor with one number, from the model"
        )


@contextmanager
def explained(task: Task) -> Iterator[None]:
    """Says in our words what no trial shows: that a memory gave BatchNorm one row alone in training."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error) or "model: " in str(error):
            raise
        raise ValueError(
            f"memory: in task {task.index} one row of it alone went through BatchNorm in training, which takes two "
            f"({error}); give a larger memory or batch, or a network without BatchNorm"
        ) from error


def _tried(mode: str, batch: Batch) -> AbstractContextManager[None]:
    what = f"model: it fails {mode} on {len(batch.x)} prepared rows, {tuple(batch.x.shape)} {batch.x.dtype}"
    return checks.explained(what, "give it what it takes, or a module that takes such rows")


def _cut(classes: int, model: nn.Module, args: Any, logits: Tensor) -> Tensor:
    """The hook of a model with more outputs than the stream has classes: they never count and never win."""
    return logits[..., :classes]

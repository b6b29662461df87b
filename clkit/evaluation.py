"""How well a model does on the tasks of a stream; on the device, in one pass."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clkit import checks
from clkit.data import IGNORED, Examples, Stream, Task, cuts
from clkit.modules import called, dtype_of, evaluation_mode, unwrapped
from clkit.weights import Weights, set_weights

EVALUATION_BATCH = 1024
LOGITS = 2**24  # numbers that the logits of a batch may have, where a row has many targets
KEPT = 2**26  # numbers that the logits of all test data may have, if something is to be kept of them: 256 MB


class Evaluation(NamedTuple):
    """Test results by task, arrays of shape (tasks,).

    `accuracy` in the stream's scenario, `masked` with the logits masked to the task's own classes (task-incremental),
    `loss` over all classes. Of token targets (N, L) each counts for itself, but for those of -100.
    """

    accuracy: np.ndarray
    masked: np.ndarray
    loss: np.ndarray


class Score(NamedTuple):
    """How well weights do on examples: the mean loss, and the accuracy in [0, 1], over all classes."""

    loss: float
    accuracy: float


@checks.arguments
def evaluate(
    model: nn.Module,
    stream: Stream,
    *,
    predict: Callable[..., Tensor] | None = None,
    batch: checks.Count = EVALUATION_BATCH,
    kept: dict[int, dict[str, Any]] | None = None,
) -> Evaluation:
    """Tests a model, in evaluation mode, on the test data of every task of a stream; one host synchronisation in all.

    `predict` maps a model, prepared inputs (N, ...) and a task to logits (N, C), or (N, L, C) for tokens; the default
    calls the model. The task is given in the "task" scenario, else None. Batches of token targets are smaller than
    `batch` where their logits would take much memory. The training flags of the model's modules are as before
    afterwards. Inputs come in the model's dtype, and outputs for more classes than the stream has do not count. Raises
    ValueError for a model with fewer outputs than the stream has classes. Logits that are not finite raise
    FloatingPointError that names the task: to mask a class, give it a finite number such as -1e9.

    `kept` saves a rule from computing again what never changes, as `PerTask` can: a dict, empty at first, that all
    tests of one run on one stream have in common. A `predict` that takes `kept` gets a dict in it for each batch of
    rows, the same one in every test. It gets none where all logits together are more than 2^26 numbers.
    """
    stream = stream.given(dtype_of(model))
    numbers = len(stream.classes) * sum(task.test.y.numel() for task in stream)
    keeps = predict and "kept" in inspect.signature(predict).parameters and numbers <= KEPT
    more = ({} if kept is None or not keeps else {"kept": kept.setdefault(number, {})} for number in count())

    def logits(task: Task, x: Tensor) -> Tensor:
        x, given = task.prepare(x), task if stream.scenario == "task" else None
        found = predict(model, x, given, **next(more)) if predict else model(x)
        return found[..., : len(stream.classes)]

    rows = [_means(model, partial(logits, t), t.test, t.classes, len(stream.classes), batch) for t in stream]
    hits, masked, loss, wrong = torch.stack(rows, 1).cpu().numpy()
    for task, number in zip(stream, wrong, strict=True):
        check_logits(number, f"the test data of task {task.index} ({task.name!r})")
    return Evaluation(masked.copy() if stream.scenario == "task" else hits, masked, loss)


def score(model: nn.Module, examples: Examples, weights: Weights) -> Score:
    """Judges weights, written into `model`, by prepared examples on its device, in evaluation mode.

    Raises FloatingPointError for logits that are not finite.
    """
    set_weights(model, weights)
    accuracy, _, loss, wrong = _means(model, model, examples).tolist()
    check_logits(wrong, "the examples to judge by")
    return Score(loss, accuracy)


@torch.no_grad()
def _means(
    model: nn.Module,
    logits_of: Callable[[Tensor], Tensor],
    examples: Examples,
    own: Sequence[int] = (0,),
    classes: int = 1,
    batch: int = EVALUATION_BATCH,
) -> Tensor:
    """The accuracy, the accuracy among the classes `own`, and the loss, means over all targets, on the device: (4,).

    The last one is the number of logits, and of sums of losses, that are not finite.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    among = torch.tensor(own, device=device)
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    with evaluation_mode(model):
        rows = min(batch, max(1, LOGITS // (examples.y[0].numel() * classes)))
        for start, end in pairwise([0, *cuts(len(examples), rows), len(examples)]):
            part = examples[start:end].to(device)
            logits = logits_of(part.x).float()
            check_width(logits, classes)
            loss = nn.functional.cross_entropy(logits.flatten(0, -2), part.y.flatten(), reduction="sum")
            hits = (logits.argmax(-1) == part.y).sum()
            masked = (among[logits[..., among].argmax(-1)] == part.y).sum()
            wrong = (~logits.isfinite()).sum() + ~loss.isfinite()
            sums += torch.stack([hits, masked, loss, wrong, (part.y != IGNORED).sum()]).double()
    return torch.cat([sums[:3] / sums[4], sums[3:4]])


def check_width(logits: Tensor, classes: int) -> None:
    """Raises ValueError if logits (..., outputs) are fewer than the stream has classes."""
    if logits.shape[-1] < classes:
        raise ValueError(f"model: it has {logits.shape[-1]} outputs for {classes} classes; give it a head for all")


def check_logits(wrong: float, where: str) -> None:
    """Raises FloatingPointError if any logits were not finite: no number is made of them."""
    if wrong:
        remedy = "after a merge re-estimate BatchNorm or take a shorter step, and mask a class by -1e9 or so"
        raise FloatingPointError(f"{where}: logits are NaN or infinite; {remedy}")


@torch.no_grad()
def outputs(model: nn.Module, weights: Weights, x: Tensor) -> Tensor:
    """What `model` gives for prepared inputs (N, ...) with other `weights` in place of its own: a teacher's logits.

    They are (N, C), or (N, L, C) for tokens; in evaluation mode and without a gradient. The model's own weights,
    statistics and training flags stay as they are.
    """
    model = unwrapped(model)
    with evaluation_mode(model):
        return called(model, weights, (x,))

"""How well a model does on the tasks of a stream; on the device, in one pass."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import log
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from clkit import checks
from clkit.data import Examples, Problem, Stream, Task, Text
from clkit.data.core import IGNORED, cuts
from clkit.modules import dtype_of, unwrapped
from clkit.weights import Weights, check_same, evaluation_mode, live_tensors, set_weights

EVALUATION_BATCH = 1024
LOGITS = 2**24  # numbers that the logits of a batch may have, where a row has many targets


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


def evaluate(
    model: nn.Module,
    stream: Stream,
    *,
    predict: Callable[[nn.Module, Tensor, Task | None], Tensor] | None = None,
    batch: int = EVALUATION_BATCH,
) -> Evaluation:
    """Tests a model, in evaluation mode, on the test data of every task of a stream; one host synchronisation in all.

    `predict` maps a model, prepared inputs (N, ...) and a task to logits (N, C), or (N, L, C) for tokens; the default
    calls the model. The task is given in the "task" scenario, else None. Batches of token targets are smaller than
    `batch` where their logits would take much memory. The training flags of the model's modules are as before
    afterwards. Inputs come in the model's dtype, and outputs for more classes than the stream has do not count. Raises
    ValueError for a model with fewer outputs than the stream has classes. Logits that are not finite raise
    FloatingPointError that names the task: to mask a class, give it a finite number such as -1e9.
    """
    stream = stream.given(dtype_of(model))

    def logits(task: Task, x: Tensor) -> Tensor:
        x = task.prepare(x)
        found = predict(model, x, task if stream.scenario == "task" else None) if predict else model(x)
        return found[..., : len(stream.classes)]

    rows = [_means(model, partial(logits, t), t.test, t.classes, len(stream.classes), batch) for t in stream]
    hits, masked, loss, wrong = torch.stack(rows, 1).cpu().numpy()
    for task, number in zip(stream, wrong, strict=True):
        _check_logits(number, f"the test data of task {task.index} ({task.name!r})")
    return Evaluation(masked.copy() if stream.scenario == "task" else hits, masked, loss)


def score(model: nn.Module, examples: Examples, weights: Weights) -> Score:
    """Judges weights, written into `model`, by prepared examples on its device, in evaluation mode.

    Raises FloatingPointError for logits that are not finite.
    """
    set_weights(model, weights)
    accuracy, _, loss, wrong = _means(model, model, examples).tolist()
    _check_logits(wrong, "the examples to judge by")
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
            if logits.shape[-1] < classes:
                raise ValueError(
                    f"model: it has {logits.shape[-1]} outputs and the stream {classes} classes; "
                    "give it a head for all of them"
                )
            loss = nn.functional.cross_entropy(logits.flatten(0, -2), part.y.flatten(), reduction="sum")
            hits = (logits.argmax(-1) == part.y).sum()
            masked = (among[logits[..., among].argmax(-1)] == part.y).sum()
            wrong = (~logits.isfinite()).sum() + ~loss.isfinite()
            sums += torch.stack([hits, masked, loss, wrong, (part.y != IGNORED).sum()]).double()
    return torch.cat([sums[:3] / sums[4], sums[3:4]])


def _check_logits(wrong: float, where: str) -> None:
    """Raises FloatingPointError if any logits were not finite: no number is made of them."""
    if wrong:
        raise FloatingPointError(
            f"{where}: logits are NaN or infinite; the weights do not make a network: after a merge "
            "re-estimate BatchNorm or take a shorter step, and mask a class by a finite number such as -1e9"
        )


@torch.no_grad()
def outputs(model: nn.Module, weights: Weights, x: Tensor) -> Tensor:
    """What `model` gives for prepared inputs (N, ...) with other `weights` in place of its own: a teacher's logits.

    They are (N, C), or (N, L, C) for tokens; in evaluation mode and without a gradient. The model's own weights,
    statistics and training flags stay as they are.
    """
    model = unwrapped(model)
    with evaluation_mode(model):
        return torch.func.functional_call(model, dict(weights), (x,))


def side_pass(model: nn.Module, x: Tensor) -> Tensor:
    """What `model` gives for prepared inputs (N, ...) in the mode it is in, its buffers left as they are.

    Logits (N, C), or (N, L, C) for tokens, with gradients.
    """
    model = unwrapped(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, buffers, (x,))


@torch.no_grad()
def continued(model: nn.Module, x: Tensor, length: int, *, context: int, weights: Weights | None = None) -> Tensor:
    """The `length` tokens (N, length) by which a model continues prompts `x` (N, L), the likeliest one each time.

    The model, tokens (N, L) to logits (N, L, C), sees the last `context` tokens. `weights` on its device take the place
    of its own. In evaluation mode; the model stays as it is. Raises FloatingPointError for logits that are not finite.
    """
    start, model, wrong = x.shape[1], unwrapped(model), torch.zeros((), dtype=torch.long, device=x.device)
    with evaluation_mode(model):
        for _ in range(length):
            logits = torch.func.functional_call(model, dict(weights or {}), (x[:, -context:],))
            x = torch.cat([x, logits[:, -1:].argmax(-1)], 1)
            wrong += (~logits[:, -1].isfinite()).sum()
    _check_logits(float(wrong), "the continuation of a prompt")
    return x[:, start:]


def bits_per_byte(losses: ArrayLike, bytes_per_token: float | Sequence[float] = 1.0) -> np.ndarray:
    """Test losses in nats per token as bits per byte of the text: loss / (ln 2 * bytes_per_token), elementwise.

    `losses` (..., tasks), such as the matrix `result.losses` of a run. `bytes_per_token` is 1 where tokens are bytes,
    else one number for each task: `[text.bytes_per_token for text in datasets]`. Makes models comparable that read
    the same text in other tokens. One that knows nothing of bytes has 8. Raises ValueError for numbers not above 0.
    """
    width = np.asarray(bytes_per_token, dtype=np.float64)
    if not (width > 0).all():
        raise ValueError(f"bytes_per_token: {bytes_per_token} must be positive; use 1 for bytes, else the texts' own")
    return np.asarray(losses, dtype=np.float64) / (log(2) * width)


@checks.arguments
def exact_match(
    model: nn.Module,
    text: Text,
    *,
    weights: Weights | None = None,
    limit: checks.Count | None = None,
    batch: checks.Count = EVALUATION_BATCH,
) -> float:
    """The share, in [0, 1], of a text's held-out problems that a model answers exactly, by greedy decoding.

    A model, tokens (N, L) to logits (N, L, C), is shown a prompt. It goes on for as many tokens as the longest of the
    solutions has, as in `continued`; it sees as many of the last tokens as the text's windows have. Its answer is the
    rest of the line behind the first marker; a line that does not end is no answer. Steps before the marker are not
    judged. Prompts of equal length go through together, `batch` at a time, without padding. `weights` take the place of
    the model's own; `limit` asks about the first so many problems. The model stays as it is. Raises ValueError for a
    text without problems, and for weights of another model.
    """
    if not text.problems:
        raise ValueError(f"text: {text.name!r} has no problems to answer; use data.texts('math')")
    if weights is not None:
        check_same(live_tensors(model), weights, names=("the model", "weights"))
    problems = text.problems[:limit]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    own = {name: tensor.to(device) for name, tensor in (weights or {}).items()}
    length = max(len(text.encode(problem.solution)) for problem in problems)
    groups: dict[int, list[tuple[Problem, list[int]]]] = {}
    for problem in problems:
        prompt = text.encode(problem.prompt)
        groups.setdefault(len(prompt), []).append((problem, prompt))
    right = 0
    for group in groups.values():
        for start in range(0, len(group), batch):
            asked, prompts = zip(*group[start : start + batch], strict=True)
            x = torch.tensor(prompts, device=device)
            found = continued(model, x, length, context=text.train.x.shape[1], weights=own).tolist()
            right += sum(p.answer_in(text.decode(f)) == p.answer for p, f in zip(asked, found, strict=True))
    return right / len(problems)

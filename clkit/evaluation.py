"""How well a model does on the tasks of a stream; on the device, in one pass."""

from collections.abc import Callable, Sequence
from math import log
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from clkit.data import Stream, Task, Text
from clkit.data.core import IGNORED
from clkit.weights import Weights, check_same, evaluation_mode, live_tensors

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


@torch.no_grad()
def evaluate(
    model: nn.Module,
    stream: Stream,
    *,
    predict: Callable[[nn.Module, Tensor, Task | None], Tensor] | None = None,
    batch: int = EVALUATION_BATCH,
) -> Evaluation:
    """Tests a model, in evaluation mode, on the test data of every task of a stream; one host synchronisation in all.

    `predict` maps a model, prepared inputs and a task (in the "task" scenario, else None) to logits; the default
    calls the model. Batches of token targets are smaller than `batch` where their logits would take much memory.
    The training flags of the model's modules are as before afterwards.
    """
    predict = predict or (lambda model, x, task: model(x))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rows = []
    with evaluation_mode(model):
        for task in stream:
            rows_each = min(batch, max(1, LOGITS // (task.test.y[0].numel() * len(stream.classes))))
            own = torch.tensor(task.classes, device=device)
            sums = torch.zeros(4, dtype=torch.float64, device=device)
            for start in range(0, len(task.test), rows_each):
                part = task.test[start : start + rows_each].to(device)
                logits = predict(model, task.prepare(part.x), task if stream.scenario == "task" else None).float()
                if logits.shape[-1] < len(stream.classes):
                    raise ValueError(
                        f"model: it has {logits.shape[-1]} outputs and the stream {len(stream.classes)} classes; "
                        "give it a head for all of them"
                    )
                inside = logits[..., own]
                loss = nn.functional.cross_entropy(logits.flatten(0, -2), part.y.flatten(), reduction="sum")
                hits = (logits.argmax(-1) == part.y).sum()
                masked = (own[inside.argmax(-1)] == part.y).sum()
                counted = (part.y != IGNORED).sum()
                sums += torch.stack([masked if stream.scenario == "task" else hits, masked, loss, counted]).double()
            rows.append(sums[:3] / sums[3])
    return Evaluation(*torch.stack(rows, 1).cpu().numpy())


@torch.no_grad()
def outputs(model: nn.Module, weights: Weights, x: Tensor) -> Tensor:
    """What `model` gives for prepared inputs with other `weights` in place of its own: a teacher's logits.

    In evaluation mode and without a gradient; the model's own weights, statistics and training flags stay as they are.
    """
    with evaluation_mode(model):
        return torch.func.functional_call(model, dict(weights), (x,))


def side_pass(model: nn.Module, x: Tensor) -> Tensor:
    """What `model` gives for prepared inputs in the mode it is in, with gradients, its buffers left as they are."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, buffers, (x,))


def bits_per_byte(losses: ArrayLike, bytes_per_token: float | Sequence[float] = 1.0) -> np.ndarray:
    """Test losses in nats per token as bits per byte of the text: loss / (ln 2 * bytes_per_token), elementwise.

    `losses` (..., tasks), such as the matrix `result.losses` of a run. `bytes_per_token` is 1 where tokens are bytes,
    else one number for each task: `[text.bytes_per_token for text in datasets]`. Makes models comparable that read
    the same text in other tokens. One that knows nothing of bytes has 8.
    """
    width = np.asarray(bytes_per_token, dtype=np.float64)
    if not (width > 0).all():
        raise ValueError(f"bytes_per_token: {bytes_per_token} must be positive; use 1 for bytes, else the texts' own")
    return np.asarray(losses, dtype=np.float64) / (log(2) * width)


@torch.no_grad()
def exact_match(
    model: nn.Module,
    text: Text,
    *,
    weights: Weights | None = None,
    limit: int | None = None,
    batch: int = EVALUATION_BATCH,
) -> float:
    """The share, in [0, 1], of a text's held-out problems that a model answers exactly, by greedy decoding.

    A model (N, L) to (N, L, C) is shown a prompt and goes on for as many tokens as the longest of the solutions has,
    always with the likeliest one. Its answer is the rest of the line behind the first marker; a line that does not end
    is no answer. Steps before the marker are not judged. Prompts of equal length go through together, without padding;
    the model sees the last tokens, as many as the text's windows have. `weights` takes the place of the model's own;
    `limit` asks about the first so many problems. The model stays as it is.
    """
    if not text.problems:
        raise ValueError(f"text: {text.name!r} has no problems to answer; use data.texts('math')")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit}; give a number of problems from 1 on, or None for all")
    if weights is not None:
        check_same(live_tensors(model), weights, names=("the model", "weights"))
    problems = text.problems[:limit]
    context = text.train.x.shape[1]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    own = {} if weights is None else {name: tensor.to(device) for name, tensor in weights.items()}
    length = max(len(text.encode(problem.solution)) for problem in problems)
    groups: dict[int, list[tuple[int, list[int]]]] = {}
    for number, problem in enumerate(problems):
        prompt = text.encode(problem.prompt)
        groups.setdefault(len(prompt), []).append((number, prompt))
    right = 0
    with evaluation_mode(model):
        for group in groups.values():
            for start in range(0, len(group), batch):
                numbers, prompts = zip(*group[start : start + batch], strict=True)
                x = torch.tensor(prompts, device=device)
                for _ in range(length):
                    logits = torch.func.functional_call(model, own, (x[:, -context:],))
                    x = torch.cat([x, logits[:, -1:].argmax(-1)], 1)
                for number, found in zip(numbers, x[:, len(prompts[0]) :].tolist(), strict=True):
                    right += problems[number].answer_in(text.decode(found)) == problems[number].answer
    return right / len(problems)

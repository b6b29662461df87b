"""How well a model does on the tasks of a stream; on the device, in one pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clkit.data import Stream, Task
from clkit.weights import Weights, uncompiled

EVALUATION_BATCH = 1024


class Evaluation(NamedTuple):
    """Test results by task, arrays of shape (tasks,).

    `accuracy` in the stream's scenario, `masked` with the logits masked to the task's own classes (task-incremental),
    `loss` over all classes.
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
    calls the model. The training flags of the model's modules are as before afterwards.
    """
    predict = predict or (lambda model, x, task: model(x))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rows = []
    with evaluation_mode(model):
        for task in stream:
            own = torch.tensor(task.classes, device=device)
            sums = torch.zeros(3, dtype=torch.float64, device=device)
            for start in range(0, len(task.test), batch):
                part = task.test[start : start + batch].to(device)
                logits = predict(model, task.prepare(part.x), task if stream.scenario == "task" else None).float()
                inside = logits[..., own]
                loss = nn.functional.cross_entropy(logits.flatten(0, -2), part.y.flatten(), reduction="sum")
                hits = (logits.argmax(-1) == part.y).sum()
                masked = (own[inside.argmax(-1)] == part.y).sum()
                sums += torch.stack([masked if stream.scenario == "task" else hits, masked, loss]).double()
            rows.append(sums / task.test.y.numel())
    return Evaluation(*torch.stack(rows, 1).cpu().numpy())


@torch.no_grad()
def outputs(model: nn.Module, weights: Weights, x: Tensor) -> Tensor:
    """What `model` gives for prepared inputs with other `weights` in place of its own: a teacher's logits.

    In evaluation mode and without a gradient; the model's own weights, statistics and training flags stay as they are.
    """
    model = uncompiled(model)
    with evaluation_mode(model):
        return torch.func.functional_call(model, dict(weights), (x,))


def side_pass(model: nn.Module, x: Tensor) -> Tensor:
    """What `model` gives for prepared inputs in the mode it is in, with gradients, its buffers left as they are."""
    model = uncompiled(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, buffers, (x,))


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

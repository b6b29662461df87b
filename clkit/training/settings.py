"""The two ends of a run: how a task is trained, and what a run gives."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from clkit import checkpoint, checks, metrics, store
from clkit.learners import LabelSpace, Learner
from clkit.training.capture import CAPTURES
from clkit.weights import Weights

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Training:
    """How a task is trained; the same for every task of a stream.

    - `epochs`, `batch` (rows of the task a step; a last row that would be alone joins the batch before), `lr`
    - `optimizer` "sgd" or "adamw", with `momentum` (SGD) and `weight_decay`
    - `schedule` of the learning rate within each task: "constant"; "cosine" or "linear" to zero; "multistep", times
      0.1 at each of the `milestones` (shares of the task's steps); it first rises for `warmup`: a share
      of the steps below 1, or so many steps, a whole number from 2 on, the last of them at the full rate
    - `clip`: the largest norm of the gradient, None for any; `label_smoothing`
    - `labels`: the label space of a step's loss: "all" classes, those "seen" so far, or the row's own "task"
    - `augment`: use the stream's augmentation
    - `precision`: "auto" is bfloat16 autocast on GPUs that have it, else float32. On a CPU with instructions for
      bfloat16 it makes convolutional networks about twice as fast, transformers slower.
    - `channels_last`: a step's images in that memory format, and on a GPU the weights of convolutions; None is yes for
      networks that convolve, unless they cannot take it: those that `view` what a convolution gives, say
    - `compile`: run the model through `torch.compile`
    - `capture`: on a GPU, replay a captured step wherever that changes nothing; see `training.capture`
    - `deterministic`: on a GPU, take cuDNN's deterministic kernels instead of its fastest; see `run`
    """

    epochs: checks.Index = 10
    batch: checks.Count = 32
    lr: checks.Positive = 0.1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: checks.Part = 0.0
    weight_decay: checks.NotNegative = 0.0
    schedule: Literal["constant", "cosine", "linear", "multistep"] = "constant"
    milestones: tuple[Annotated[float, checks.Range(0, 1, "both", "shares of a task's steps")], ...] = (0.7, 0.9)
    warmup: checks.Part | Annotated[int, checks.Range(2, means="steps")] = 0.0
    clip: checks.Positive | None = None
    label_smoothing: checks.Part = 0.0
    labels: LabelSpace = "all"
    augment: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    channels_last: bool | None = None
    compile: bool = False
    capture: bool = True
    deterministic: bool = False
    __post_init__ = checks.fields

    def rate(self, step: int, steps: int) -> float:
        """The factor on the learning rate in step `step` of `steps`."""
        counted = self.warmup > 1
        rise = self.warmup if counted else self.warmup * steps
        if step < rise:
            return (step + 1) / (rise if counted else rise + 1)
        share = (step - rise) / max(1.0, steps - rise)
        if self.schedule == "cosine":
            return 0.5 * (1 + float(np.cos(np.pi * share)))
        if self.schedule == "linear":
            return 1 - share
        if self.schedule == "multistep":
            return 0.1 ** sum(step >= m * steps for m in self.milestones)
        return 1.0

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer over the parameters that want gradients. Raises ValueError if there are none."""
        wanted = [p for p in parameters if p.requires_grad]
        if not wanted:
            raise ValueError("model: it has no parameter that requires a gradient; there is nothing to train")
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        options["fused"] = all(p.is_floating_point() and store.dense(p) for p in wanted)  # it writes all of a block
        if wanted[0].device.type in CAPTURES:  # a replay reads a rate that is a tensor
            options["lr"] = torch.tensor(self.lr, dtype=torch.float32, device=wanted[0].device)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(wanted, **options)
        return torch.optim.SGD(wanted, momentum=self.momentum, **options)

    def set_rate(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Sets the learning rate of an optimizer that `make_optimizer` made."""
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


@dataclass(eq=False)
class Result:
    """What a run gives. T tasks; accuracies in [0, 1].

    - `config`: the record, JSON-able
    - `model`, `learner`: copies that end with the weights training would go on from, and the learner's last state
    - `accuracy` (T, T): row t after learning task t, column k the test accuracy on task k, in the stream's scenario
    - `masked`, `losses` (T, T): the same with logits masked to the task's classes, and the mean test loss
    - `initial` (T,): accuracies before any training
    - `weights[t]`: deployed after task t; `trained[t]`: as trained on task t, before consolidation; on the CPU, and
      empty with `keep=False`
    - `inputs[t]`: what a consolidation may look at after task t, on the CPU; empty with `keep=False`
    - `reports[t]`: what the consolidation last reported in task t, empty if it was not due
    - `training_loss[t]`: the loss of every step of task t
    - `watched`: with `watch`, a dict for each look at all tasks on the way: "learning" (the task), "step" (within it),
      "when" ("step", or "before" or "after" a consolidation) and "accuracy" (T,)
    - `seconds`: the duration, over all interruptions
    - `state`: what `run(longer_stream, ..., resume=result)` goes on from; a copy, so that `model` is free to be changed

    Of a run that went on with more tasks, what was not measured is NaN: a row of `accuracy`, `masked`, `losses` or
    `watched` for tasks that were not known then. `initial` and the last row before them are measured anew, so that no
    measure of `metrics` is NaN.
    """

    config: dict[str, Any]
    model: nn.Module
    learner: Learner
    accuracy: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    masked: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    losses: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    initial: np.ndarray = field(default_factory=lambda: np.empty(0))
    weights: list[Weights] = field(default_factory=list)
    trained: list[Weights] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    training_loss: list[np.ndarray] = field(default_factory=list)
    watched: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    state: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path | str) -> None:
        """Writes all but `model` and `learner` to a file, by rename, as a checkpoint of `run` does.

        With `result.state = {}` before, the file is smaller and can only be read.
        Raises ValueError if the path cannot be written, TypeError on reports that a file cannot hold.
        """
        checkpoint.write(store.writable(path), vars(self))

    @classmethod
    def load(cls, path: Path | str) -> "Result":
        """Reads what `save`, or a checkpoint of a run, wrote; on any machine.

        A file holds no code, and so neither `model` nor `learner`. `run(stream, model, learner, ..., resume=result)`
        with the arguments of the first run trains nothing more and gives a result with both.

        Raises ValueError on a file that is damaged or something else, FileNotFoundError where there is none.
        """
        result = cls.__new__(cls)
        vars(result).update(checkpoint.read(path))
        return result

    def __getattr__(self, name: str) -> NoReturn:
        why = "a file holds no code; run(stream, model, learner, ..., resume=result) gives it back"
        raise AttributeError(f"{name}: {why if name in ('model', 'learner') else 'a Result has no such attribute'}")

    def summary(self) -> dict[str, float]:
        """acc, forgetting, bwt, fwt, last and plasticity, as `metrics` defines them."""
        done = len(self.accuracy)  # tasks: fewer than columns in the checkpoint of an unfinished run
        return metrics.summary(self.accuracy[:, :done], self.initial[:done])

    def trajectory(self) -> "DataFrame":
        """The looks on the way as a tidy table: learning, step (of the whole stream), when, task, accuracy."""
        import pandas as pd

        before = np.cumsum([0, *map(len, self.training_loss)])
        rows = [
            {"learning": look["learning"], "step": int(before[look["learning"]]) + look["step"], "when": look["when"],
             "task": task, "accuracy": float(accuracy)}
            for look in self.watched
            for task, accuracy in enumerate(look["accuracy"])
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=["learning", "step", "when", "task", "accuracy"])

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={value:.3f}" for name, value in self.summary().items())
        return f"Result({numbers}; {len(self.accuracy)} tasks, seed {self.config['seed']})"

"""What a run gives."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from clkit import metrics
from clkit.learners import Learner
from clkit.weights import Weights

if TYPE_CHECKING:
    from pandas import DataFrame


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

    def summary(self) -> dict[str, float]:
        """acc, forgetting, bwt, fwt, last and plasticity, as `metrics` defines them."""
        return metrics.summary(self.accuracy, self.initial)

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

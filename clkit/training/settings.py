"""How a task is trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import get_args

import numpy as np
import torch
from torch import nn

from clkit.learners import LabelSpace

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "cosine", "linear", "multistep")
PRECISIONS = ("auto", "float32", "bfloat16")


def _choice(name: str, value: object, known: Iterable[str]) -> None:
    options = list(known)
    if value not in options:
        close = get_close_matches(str(value), options, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}: {value!r} is unknown; choose one of {', '.join(options)}{hint}")


@dataclass(frozen=True)
class Training:
    """How a task is trained; the same for every task of a stream.

    - `epochs`, `batch` (rows of the task a step; a last batch of one row is left out), `lr`
    - `optimizer` "sgd" or "adamw", with `momentum` (SGD) and `weight_decay`
    - `schedule` of the learning rate within each task: "constant"; "cosine" or "linear" to zero; "multistep", times
      0.1 at each of the `milestones` (shares of the task's steps); it first rises for `warmup`, a share of the steps
    - `clip`: the largest norm of the gradient, None for any; `label_smoothing`
    - `labels`: the label space of a step's loss: "all" classes, those "seen" so far, or the row's own "task"
    - `augment`: use the stream's augmentation
    - `precision`: "auto" is bfloat16 autocast on GPUs that have it, else float32; `channels_last`: None is yes on a GPU
    - `compile`: run the model through `torch.compile`
    """

    epochs: int = 10
    batch: int = 32
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    milestones: tuple[float, ...] = (0.7, 0.9)
    warmup: float = 0.0
    clip: float | None = None
    label_smoothing: float = 0.0
    labels: LabelSpace = "all"
    augment: bool = True
    precision: str = "auto"
    channels_last: bool | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("labels", get_args(LabelSpace))):
            _choice(name, getattr(self, name), known)
        _choice("precision", self.precision, PRECISIONS)
        for name, low in (("epochs", 0), ("batch", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < low:
                raise ValueError(f"{name}: {getattr(self, name)!r}; give a whole number, at least {low}")
        if not self.lr > 0:
            raise ValueError(f"lr: {self.lr!r}; give a learning rate above 0")
        for name in ("momentum", "label_smoothing", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r}; give a number in [0, 1)")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: {self.weight_decay!r}; give a number, at least 0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: {self.clip!r}; give the largest norm of the gradient, above 0, or None")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if not all(0 < m < 1 for m in self.milestones):
            raise ValueError(f"milestones: {self.milestones!r}; give shares of a task's steps in (0, 1)")

    def rate(self, step: int, steps: int) -> float:
        """The factor on the learning rate in step `step` of `steps`."""
        rise = self.warmup * steps
        if step < rise:
            return (step + 1) / (rise + 1)
        share = (step - rise) / max(1.0, steps - rise)
        if self.schedule == "cosine":
            return 0.5 * (1 + float(np.cos(np.pi * share)))
        if self.schedule == "linear":
            return 1 - share
        if self.schedule == "multistep":
            return 0.1 ** sum(step >= m * steps for m in self.milestones)
        return 1.0

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer over the parameters that want gradients."""
        wanted = [p for p in parameters if p.requires_grad]
        if not wanted:
            raise ValueError("model: it has no parameter that requires a gradient; there is nothing to train")
        if self.optimizer == "adamw":
            return torch.optim.AdamW(wanted, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(wanted, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

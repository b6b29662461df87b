"""How a task is trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import nn

from clkit import checks
from clkit.learners import LabelSpace


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

    epochs: checks.Index = 10
    batch: checks.Count = 32
    lr: checks.Positive = 0.1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: checks.Part = 0.0
    weight_decay: checks.NotNegative = 0.0
    schedule: Literal["constant", "cosine", "linear", "multistep"] = "constant"
    milestones: tuple[Annotated[float, checks.Range(0, 1, "both", "shares of a task's steps")], ...] = (0.7, 0.9)
    warmup: checks.Part = 0.0
    clip: checks.Positive | None = None
    label_smoothing: checks.Part = 0.0
    labels: LabelSpace = "all"
    augment: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    channels_last: bool | None = None
    compile: bool = False
    __post_init__ = checks.fields

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
        """A fresh optimizer over the parameters that want gradients. Raises ValueError if there are none."""
        wanted = [p for p in parameters if p.requires_grad]
        if not wanted:
            raise ValueError("model: it has no parameter that requires a gradient; there is nothing to train")
        if self.optimizer == "adamw":
            return torch.optim.AdamW(wanted, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(wanted, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

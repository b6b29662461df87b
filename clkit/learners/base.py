"""The learner that every rule starts from: plain fine-tuning, and the hooks that a rule overrides."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.data import Batch, Examples, Stream, Task
from clkit.data.core import IGNORED

LABELS = ("all", "seen", "task")
CONTEXT_ROWS = 1000


class Criterion:
    """Cross entropy over the label space of a step's loss: all classes, those seen so far, or the row's own task's.

    Logits are (N, C) with labels (N,), or (N, L, C) with (N, L). With "task" every row competes among the classes of
    the task that its label belongs to, so replayed rows keep to their own task. A class outside a row's label space
    gets no gradient from it, and a target of -100 carries no loss.
    """

    def __init__(self, stream: Stream, labels: str, smoothing: float, device: torch.device) -> None:
        self.labels, self.smoothing = labels, smoothing
        tasks, classes = len(stream), len(stream.classes)
        member = torch.zeros(tasks, classes, dtype=torch.bool)
        for task in stream:
            member[task.index, list(task.classes)] = True
        self.member = member.to(device)
        self.first_task = member.to(torch.uint8).argmax(0).to(device)
        self.task = 0

    def begin_task(self, task: Task) -> None:
        """Makes the classes of `task` count as seen."""
        self.task = task.index

    def space(self, y: Tensor) -> Tensor | None:
        """The classes that each label of `y` competes with, as a mask that broadcasts to the logits; None for all."""
        if self.labels == "all":
            return None
        if self.labels == "seen":
            return self.member[: self.task + 1].any(0)
        return self.member[self.first_task[y.clamp(min=0)]]

    def __call__(self, logits: Tensor, y: Tensor, reduction: str = "mean", *, among: Tensor | None = None) -> Tensor:
        """The loss of logits against labels; `reduction` as in torch: "mean", "sum" or "none".

        `among` is a mask of classes (C,), all labels in it, to which the label space is narrowed.
        """
        space = self.space(y)
        if among is not None:
            space = among if space is None else space & among
        if space is None:
            return F.cross_entropy(
                logits.flatten(0, -2), y.flatten(), reduction=reduction, label_smoothing=self.smoothing
            )
        log_p = logits.masked_fill(~space, float("-inf")).log_softmax(-1)
        hit = -log_p.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        if self.smoothing:
            space = space.expand_as(log_p)
            spread = -log_p.masked_fill(~space, 0).sum(-1) / space.sum(-1)
            hit = (1 - self.smoothing) * hit + self.smoothing * spread
        counts = y != IGNORED
        hit = hit.masked_fill(~counts, 0)
        if reduction == "mean":
            return hit.sum() / counts.sum()
        return hit.sum() if reduction == "sum" else hit.flatten()


@dataclass(eq=False)
class Setting:
    """What a learner gets before the first task: its own generator, the loss and sizes."""

    generator: torch.Generator
    criterion: Criterion
    classes: int
    batch: int
    holdout: float
    """The share of a memory that is kept from replay, for choosing settings by; what a consolidation asks for."""


@dataclass
class Learner:
    """Plain fine-tuning: a step minimises the loss of its batch and nothing is remembered.

    A rule overrides the one to three hooks it changes. The fields of a learner are its settings and its repr is the
    record; state begins in `start`. `run` works on a copy, so one learner serves many runs.
    """

    remembers: ClassVar[bool] = False
    """Whether a memory is kept, a part of which can be held out of replay."""

    def start(self, setting: Setting) -> None:
        """Called once before the first task, with everything a rule may need to set itself up."""
        if setting.holdout and not self.remembers:
            raise ValueError(
                f"holdout: the consolidation asks for {setting.holdout:g} of the memory to be held out and {self!r} "
                "keeps none; use a learner with a memory, such as ER, or a consolidation without a holdout"
            )
        self.setting = setting

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Called before the first step on `task`; the model holds the weights that training goes on from."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a step minimises: a scalar."""
        return self.setting.criterion(model(batch.x), batch.y)

    def adjust_gradients(self, model: nn.Module, batch: Batch) -> None:
        """Called between the backward pass and the optimizer's step, to change the gradients in place."""

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Called after the optimizer's step, to fill a memory for example."""

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Called after the last step on `task`, its data still at hand and the weights as trained."""

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Called with the weights that training goes on from: where anchors and teachers are taken."""

    def calibrate(self, model: nn.Module, task: Task) -> None:
        """Called with the deployed weights; may change only what `predict` uses."""

    def predict(self, model: nn.Module, x: Tensor, task: Task | None = None) -> Tensor:
        """Logits for prepared inputs; `task` is given in task-incremental evaluation alone."""
        return model(x)

    def examples(self, task: Task) -> Examples:
        """What a consolidation may look at, prepared: the memory, else 1,000 evenly spaced rows of this task's data."""
        return self._evenly(task, task.train)

    def _evenly(self, task: Task, kept: Examples) -> Examples:
        """1,000 evenly spaced rows of what was kept, or all if they are fewer, prepared."""
        rows = torch.linspace(0, len(kept) - 1, min(CONTEXT_ROWS, len(kept))).long()
        some = kept[rows.to(kept.x.device)].to(self.setting.generator.device)
        return Examples(task.prepare(some.x), some.y)

    def held_out(self, task: Task) -> Examples | None:
        """Prepared examples that no step has trained on, for choosing settings by; None if there are none."""
        return None

    def inputs(self, task: Task) -> Tensor:
        """The inputs of `examples`."""
        return self.examples(task).x

    def state_dict(self) -> dict[str, Tensor]:
        """The learner's state as tensors; `load_state_dict` after `start` restores it bit for bit."""
        return {"generator": self.setting.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` of a learner of the same settings gave."""
        self.setting.generator.set_state(state["generator"])


def named(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that begin with `group` and a dot, for a state_dict."""
    return {f"{group}.{name}": tensor for name, tensor in tensors.items()}


def under(group: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `named` put into a state: the tensors whose names begin with `group` and a dot, by what follows it."""
    return {name.removeprefix(f"{group}."): t for name, t in state.items() if name.startswith(f"{group}.")}

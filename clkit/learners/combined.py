"""A learning rule with the loss terms of others."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from clkit.data import Batch, Examples, Task
from clkit.learners.base import Learner, Setting


@runtime_checkable
class Adding(Protocol):
    """A rule whose only doing is a term that it adds to the loss, such as a penalty, or to the step."""

    def term(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """What the rule adds to the loss of a step; None for nothing."""
        ...


@dataclass(init=False)
class Sum(Learner):
    """Trains as `first` does with the loss terms of `others` added: `Sum(ER(memory=50), EWC())`.

    The others are rules that only add a term to the loss (L2, EWC, OnlineEWC, SI, MAS, LwF) or to the step
    (DecoupledL2). Their terms are of the current rows. Every event of training reaches all parts, in order. The first
    says what to predict, and what a consolidation may look at. Each part draws from a generator of its own, so the
    first draws the same numbers as alone. With others of strength 0, and in the first task, it trains bit for bit as
    alone. SI takes the other terms for a part of the loss, and a decay for a part of the step.

    Raises TypeError on a part that is no learner, and on others that do more than add a term.
    """

    first: Learner
    others: tuple[Learner, ...]

    def __init__(self, first: Learner, *others: Learner) -> None:
        for part in (first, *others):
            if not isinstance(part, Learner):
                raise TypeError(f"Sum: {part!r} is not a learner; pass instances, as in Sum(ER(memory=50), EWC())")
        for part in others:
            if not isinstance(part, Adding):
                raise TypeError(f"Sum: {part!r} does more than add a term to the loss; put it first, as ER in ER + EWC")
        self.first, self.others = first, others

    def __repr__(self) -> str:
        return f"Sum({', '.join(map(repr, self.parts))})"

    @property
    def parts(self) -> tuple[Learner, ...]:
        """The first and the others."""
        return (self.first, *self.others)

    @property
    def remembers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the first keeps a memory."""
        return self.first.remembers

    def start(self, setting: Setting) -> None:
        """Starts all parts; the others with generators of their own."""
        self.setting = setting
        self.first.start(setting)
        seed, device = setting.generator.initial_seed(), setting.generator.device
        for i, part in enumerate(self.others, 1):
            own = torch.Generator(device).manual_seed(seed + i)
            part.start(replace(setting, generator=own, holdout=0.0))

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Checks the network for all parts."""
        for part in self.parts:
            part.check(model, x)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Begins the task in all parts."""
        for part in self.parts:
            part.begin_task(model, task)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the first and the terms of the others."""
        loss = self.first.loss(model, batch)
        for part in self.others:
            assert isinstance(part, Adding)
            term = part.term(model, batch)
            loss = loss if term is None else loss + term
        return loss

    def adjust_gradients(self, model: nn.Module, batch: Batch) -> None:
        """Lets the others see the gradients, then the first change them."""
        for part in (*self.others, self.first):
            part.adjust_gradients(model, batch)

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Tells all parts of the step."""
        for part in self.parts:
            part.after_step(model, batch)

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Ends the training on a task in all parts."""
        for part in self.parts:
            part.after_training(model, task)

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Shows all parts the weights that training goes on from."""
        for part in self.parts:
            part.on_consolidated(model, task)

    def calibrate(self, model: nn.Module, task: Task) -> None:
        """Shows the first the deployed weights."""
        self.first.calibrate(model, task)

    def predict(self, model: nn.Module, x: Tensor, task: Task | None = None) -> Tensor:
        """Predicts as the first does."""
        return self.first.predict(model, x, task)

    def examples(self, task: Task) -> Examples:
        """The examples of the first."""
        return self.first.examples(task)

    def held_out(self, task: Task) -> Examples | None:
        """What the first holds out of its training."""
        return self.first.held_out(task)

    def state_dict(self) -> dict[str, Any]:
        """The state of every part, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)

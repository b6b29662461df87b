"""Rules that pull parameters to where they were, as hard as they are important, and sums of a rule and such terms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from clkit import checks, curvature
from clkit.data import Batch, Examples, Task
from clkit.learners.base import Learner, Setting

# one kernel for all tensors of a list, where there is one
_OPERATIONS = ("add", "add_", "mul", "mul_", "sub", "sub_")
_add, _add_, _mul, _mul_, _sub, _sub_ = (getattr(torch, f"_foreach_{name}") for name in _OPERATIONS)


@dataclass
class Anchored(Learner):
    """Pulls every parameter to an anchor, the harder the more important it is; the base of L2, EWC, SI and MAS.

    A step minimises loss + factor strength sum_i importance_i (theta_i - anchor_i)^2, over the parameters that want
    a gradient. There is no anchor in the first task, which is that of fine-tuning bit for bit. The anchor is taken at
    the weights that training goes on from. A parameter that is not in the anchor (it came later) is free, and one of
    the anchor that is now frozen adds nothing. `factor` is the paper's own, so that published strengths mean the same.

    Gradient descent stays stable while lr 2 factor strength importance_i < 2. A loss that grows without bound in the
    second task or later wants less strength or a smaller lr.
    """

    strength: checks.NotNegative = 1.0
    factor: ClassVar[float] = 0.5
    state: ClassVar[tuple[str, ...]] = ("anchor", "importance")

    def start(self, setting: Setting) -> None:
        """Begins without an anchor."""
        super().start(setting)
        self.anchor: dict[str, Tensor] = {}
        self.importance: dict[str, Tensor] | None = {}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the batch, and the penalty from the second task on: a scalar."""
        loss, term = super().loss(model, batch), self.term(model, batch)
        return loss if term is None else loss + term

    def term(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """What this rule adds to a loss: the penalty, a scalar; None where there is nothing to pull."""
        return self.penalty(model) if self._names(model)[0] else None

    def penalty(self, model: nn.Module) -> Tensor:
        """factor strength sum_i importance_i (theta_i - anchor_i)^2, a scalar."""
        names, live = self._names(model)
        moved = _flat(live, names) - _flat(self.anchor, names)
        pulled = moved if self.importance is None else moved * _flat(self.importance, names)
        return self.factor * self.strength * (pulled * moved).sum()

    @torch.no_grad()
    def pull(self, model: nn.Module) -> dict[str, Tensor]:
        """The gradient of the penalty by parameter: 2 factor strength importance_i (theta_i - anchor_i)."""
        names, live = self._names(model)
        if not names:
            return {}
        pull = _sub([live[n] for n in names], [self.anchor[n] for n in names])
        if self.importance is not None:
            _mul_(pull, [self.importance[n] for n in names])
        _mul_(pull, 2 * self.factor * self.strength)
        return dict(zip(names, pull, strict=True))

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Takes the anchor, and adds the task's importance to that of earlier tasks."""
        self.anchor, new = parameter_values(model), self.task_importance(model, task)
        self.importance = None if new is None else _added(self.importance or {}, new)

    def task_importance(self, model: nn.Module, task: Task) -> dict[str, Tensor] | None:
        """How important a task just learned makes each parameter, by name; None where all matter alike."""
        return None

    def sampled(self, task: Task, samples: int | None) -> Examples:
        """The task's training data, prepared and not augmented: all, or `samples` random rows."""
        generator, rows = self.setting.generator, None
        if samples is not None and samples < len(task.train):
            rows = torch.randperm(len(task.train), generator=generator, device=generator.device)[:samples]
        return self._prepared(task, task.train, rows)

    def _names(self, model: nn.Module) -> tuple[list[str], dict[str, nn.Parameter]]:
        live = curvature.trainable(model)
        return [name for name in self.anchor if name in live], live


def parameter_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that want a gradient, by name, each in its own shape."""
    return {name: p.detach().clone() for name, p in curvature.trainable(model).items()}


def _added(old: Mapping[str, Tensor], new: Mapping[str, Tensor], decay: float = 1.0) -> dict[str, Tensor]:
    """decay old + new, by name; a name that `old` does not have counts as zero."""
    return {name: torch.add(t, old[name], alpha=decay) if name in old else t for name, t in new.items()}


def _flat(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


@dataclass
class L2(Anchored):
    """Pulls all parameters alike to the weights at the end of the previous task.

    The baseline of Kirkpatrick et al. 2017 (arXiv 1612.00796): loss + strength / 2 ||theta - theta_previous||^2.
    """

    strength: checks.NotNegative = 0.1


@dataclass
class DecoupledL2(L2):
    """L2 outside the optimizer: a decay towards the previous weights, as AdamW's weight decay is one towards zero.

    theta <- theta - lr u - lr strength (theta - theta_previous). Here u is the optimizer's direction from the task's
    gradients alone and lr the step's learning rate; the loss has no penalty. With plain gradient descent it is L2. With
    momentum or Adam it is not (Loshchilov & Hutter 2019, arXiv 1711.05101, on decay and penalty). It is then still SFA
    (Kleiman et al. 2025, arXiv 2501.05559) with a merge after every step, beta = lr strength and a learning rate of
    lr / (1 - beta). It stays stable while lr strength < 2. The decay comes after the step, so `Training.clip` does not
    see it.
    """

    def term(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Nothing: the loss is that of the task."""
        return None

    def adjust_gradients(self, model: nn.Module, batch: Batch) -> None:
        """Notes the pull at the weights that the gradients are of; changes no gradient."""
        self.noted = self.pull(model)

    @torch.no_grad()
    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Adds the decay to the optimizer's step."""
        live = curvature.trainable(model)
        if self.noted:
            _add_([live[n] for n in self.noted], list(self.noted.values()), alpha=-batch.lr)


class _Fisher(Anchored):
    """An anchored rule whose importance is the diagonal Fisher information."""

    labels: curvature.FisherLabels
    samples: checks.Count | None

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Tries the Fisher information of the inputs."""
        labels = "sampled" if self.labels == "true" else self.labels
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device) if labels == "weighted" else None
        curvature.fisher(model, x, labels=labels, y=y, generator=torch.Generator(x.device).manual_seed(0))

    def task_importance(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """The diagonal Fisher information of the task's training data at the model's weights, by name."""
        rows, g = self.sampled(task, self.samples), self.setting.generator
        space = self.setting.criterion.space(rows.y)
        return curvature.fisher(model, rows.x, labels=self.labels, y=rows.y, space=space, generator=g)


@dataclass
class EWC(_Fisher):
    """Elastic weight consolidation: pulls parameters to earlier weights by the Fisher information of each task.

    Kirkpatrick et al. 2017 (arXiv 1612.00796): loss + strength / 2 sum_t sum_i F_t,i (theta_i - theta_t,i)^2, one
    quadratic for every earlier task. They add up to one quadratic around the Fisher-weighted mean of the anchors, and
    a constant: the state does not grow with the tasks. The paper leaves open how F is computed. Here it is by
    per-example gradients on the task's training data, not augmented, over the label space of the loss; on `samples`
    random examples (None: all), with the `labels` of `curvature.fisher`.
    """

    strength: checks.NotNegative = 10.0
    labels: curvature.FisherLabels = "sampled"
    samples: checks.Count | None = None

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Adds this task's quadratic to the one there is."""
        earlier, new, here = self.importance or {}, self.task_importance(model, task), parameter_values(model)
        total = _added(earlier, new)
        self.anchor = self.anchor | {
            name: torch.lerp(self.anchor.get(name, here[name]), here[name], torch.where(f > 0, new[name] / f, 1.0))
            for name, f in total.items()
        }
        self.importance = earlier | total


@dataclass
class OnlineEWC(_Fisher):
    """Online elastic weight consolidation: pulls parameters to the previous weights by a running Fisher information.

    Schwarz et al. 2018 (arXiv 1805.06370): loss + strength sum_i F_i (theta_i - theta_previous,i)^2, where
    F <- gamma F + F_t at the end of task t: `gamma` below 1 lets old tasks fade. F_t is a mean over a task's examples,
    computed as in EWC, and is not normalised. Mammoth's code, by which published strengths are meant, has no half
    before the penalty, as here; the paper has one. Its F_t is that of `labels="weighted"`, taken on augmented rows and
    with BatchNorm in training mode: mind that the other labels make F_t larger, by orders where the data are fitted.
    """

    strength: checks.NotNegative = 10.0
    gamma: checks.Share = 1.0
    labels: curvature.FisherLabels = "sampled"
    samples: checks.Count | None = None
    factor: ClassVar[float] = 1.0

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Takes the anchor and updates the running Fisher information."""
        self.anchor, new = parameter_values(model), self.task_importance(model, task)
        self.importance = _added(self.importance or {}, new, self.gamma)


@dataclass
class SI(Anchored):
    """Synaptic intelligence: pulls parameters to the previous weights by how much each has lowered the loss.

    Zenke et al. 2017 (arXiv 1703.04200): loss + strength sum_i Omega_i (theta_i - theta_previous,i)^2, `strength` the
    paper's c. Over the steps of a task omega_i = -sum g_i (theta_i after - theta_i before), and Delta_i is the distance
    gone. g is the gradient of the loss without the penalty. Then Omega_i += max(omega_i, 0) / (Delta_i^2 + xi). The
    path is made of optimizer steps alone: a consolidation's jumps, in mid-task or at its end, are neither in omega nor
    in Delta. The gradient is that before clipping.

    Mammoth's code takes the gradient with the penalty's in it for g, cuts its entries off at 1, and lets omega_i be
    negative.
    """

    strength: checks.NotNegative = 0.1
    xi: Annotated[float, checks.Range(0, open="low", means="which bounds the importance of what hardly moved")] = 0.1
    factor: ClassVar[float] = 1.0
    state: ClassVar[tuple[str, ...]] = ("path", "travelled")

    def start(self, setting: Setting) -> None:
        """Begins without an anchor and at the start of a path."""
        super().start(setting)
        self.path: dict[str, Tensor] = {}
        self.travelled: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Begins a path."""
        self.path = {name: torch.zeros_like(p) for name, p in curvature.trainable(model).items()}
        self.travelled = dict(self.path)

    @torch.no_grad()
    def adjust_gradients(self, model: nn.Module, batch: Batch) -> None:
        """Notes where the step starts and the gradient of the loss without the penalty; changes no gradient."""
        self.before = parameter_values(model)
        live = curvature.trainable(model)
        self.slope = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in live.items()}
        if pull := self.pull(model):
            _sub_([self.slope[n] for n in pull], list(pull.values()))

    @torch.no_grad()
    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Goes on along the path."""
        live, names = curvature.trainable(model), list(self.path)
        step = _sub([live[n] for n in names], [self.before[n] for n in names])
        lowered = _mul(step, [self.slope[n] for n in names])
        self.travelled = dict(zip(names, _add(list(self.travelled.values()), step), strict=True))
        self.path = dict(zip(names, _sub(list(self.path.values()), lowered), strict=True))

    def task_importance(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """What the path makes of each parameter, by name: max(omega_i, 0) / (Delta_i^2 + xi)."""
        return {name: omega.relu() / (self.travelled[name].square() + self.xi) for name, omega in self.path.items()}

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Takes the anchor, turns the path into importance and ends it."""
        super().on_consolidated(model, task)
        self.path, self.travelled = {}, {}


@dataclass
class MAS(Anchored):
    """Memory aware synapses: pulls parameters to the previous weights by how much the outputs react to each.

    Aljundi et al. 2018 (arXiv 1711.09601): loss + strength sum_i Omega_i (theta_i - theta_previous,i)^2; Omega sums up,
    over the tasks, the mean of |d ||f(x)||^2 / d theta_i| over a task's training data, not augmented: `samples` random
    examples, None for all. The paper leaves open which outputs count: here all of the network's.
    """

    strength: checks.NotNegative = 0.1
    samples: checks.Count | None = None
    factor: ClassVar[float] = 1.0

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Tries the sensitivity to the inputs."""
        curvature.sensitivity(model, x)

    def task_importance(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """How much the outputs on the task's training data react to each parameter, by name."""
        return curvature.sensitivity(model, self.sampled(task, self.samples).x)


@runtime_checkable
class Adding(Protocol):
    """A rule whose only doing is a term that it adds to the loss, such as a penalty, or to the step."""

    def term(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """What the rule adds to the loss of a step; None for nothing."""
        ...


def _told_to_all(event: str) -> Callable[..., None]:
    """A hook that passes an event of training on to all parts of a sum."""

    def tell(self: "Sum", *about: Any) -> None:
        for part in self.parts:
            getattr(part, event)(*about)

    return tell


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

    check, begin_task, after_step, after_training, on_consolidated = map(
        _told_to_all, ("check", "begin_task", "after_step", "after_training", "on_consolidated")
    )

    def start(self, setting: Setting) -> None:
        """Starts all parts; the others with generators of their own."""
        self.setting = setting
        self.first.start(setting)
        seed, device = setting.generator.initial_seed(), setting.generator.device
        for i, part in enumerate(self.others, 1):
            own = torch.Generator(device).manual_seed(seed + i)
            part.start(replace(setting, generator=own, holdout=0.0))

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

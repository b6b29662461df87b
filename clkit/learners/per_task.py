"""Parameter isolation: tensors of its own for every task, on a frozen network."""

from copy import copy
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.curvature import ridge
from clkit.data import Batch, Task
from clkit.learners.base import Learner, Setting
from clkit.models import features
from clkit.modulation import Modulated, TaskState

NOT_CHOSEN = 20.0  # what log probabilities in the tasks that are not chosen lose
LOOK = 1000  # rows of a task that its nearest earlier one is found by


@dataclass
class PerTask(Learner):
    """Gives every task tensors of its own on a frozen network, a `Modulated`, and never touches them again.

    Adaptive weight modulation (Sverdlov & Ullman 2023, arXiv 2311.15276), Piggyback's masks (Mallya et al. 2018) or
    whatever else the model's rule is. A task starts at the backbone, trains over its own classes alone, and leaves a
    `TaskState` in `tasks`. What it answers later is a function of that, so forgetting is zero bit for bit. The paper
    has the task given when testing.

    - `infer`: how the task is found where it is not given. Every finished task answers. The one wins whose head has the
      lowest "entropy" (over that of a uniform answer), or whose BatchNorm "statistics" are nearest to the input's. The
      logits are each task's log probabilities, with 20 subtracted in the tasks that are not chosen.
    - `begin`: where gains and statistics start: at the "backbone", as in the paper; at the "previous" task; or at the
      "nearest" one, the backbone among them. On its features ridge regression predicts held-out rows of the new task
      best.
    - `shared`: parts that all tasks share, among "statistics", "affine" and "head", as a control: then tasks forget
    """

    infer: Literal["entropy", "statistics"] = "entropy"
    begin: Literal["backbone", "previous", "nearest"] = "backbone"
    shared: tuple[Literal["statistics", "affine", "head"], ...] = ()
    state: ClassVar[tuple[str, ...]] = ("tasks", "trained")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.infer == "statistics" and "statistics" in self.shared:
            raise ValueError("shared: 'statistics' that are shared tell no task from another; infer by 'entropy'")

    def start(self, setting: Setting) -> None:
        """Begins without a task."""
        super().start(setting)
        self.tasks: dict[int, TaskState] = {}
        self.trained: dict[int, TaskState] = {}
        self.live: int | None = None
        self.criterion = copy(setting.criterion)
        self.criterion.labels = "all"

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Refuses a network that is not modulated."""
        _modulated(model)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Sets the live tensors to where the task starts."""
        net = _modulated(model)
        self.live = task.index
        earlier = None
        if self.trained:
            earlier = self.trained[max(self.trained)] if self.begin == "previous" else self._nearest(net, task)
        net.begin(earlier, keep=self.shared if self.tasks else ())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss among the task's own classes."""
        return self.criterion(model(batch.x), batch.y, among=self.criterion.member[batch.task.index])

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Keeps what later tasks may start from, which a consolidation may deploy otherwise."""
        if self.begin != "backbone":
            self.trained[task.index] = _modulated(model).state(task.classes)

    def calibrate(self, model: nn.Module, task: Task) -> None:
        """Takes the task's tensors out of the deployed model."""
        self.tasks[task.index] = _modulated(model).state(task.classes)
        self.live = None

    def predict(
        self, model: nn.Module, x: Tensor, task: Task | None = None, kept: dict[str, Any] | None = None
    ) -> Tensor:
        """Logits in the task given, or in the one that is found; a task that is not begun yet is at its start.

        What a finished task answers never changes. `kept`, a dict that comes again with the same `x`, holds what all
        finished tasks answered together: two numbers for a row and class, however many tasks there are. With it only
        tasks that are new to it compute, and the logits are the same bit for bit. Where parts are shared all compute.

        Raises ValueError where the entropy of one class's answer would have to tell tasks apart.
        """
        net = _modulated(model)
        if task is not None and task.index == self.live:
            return net(x)
        if task is not None or not self.tasks:
            state = self.tasks.get(task.index) if task is not None else None
            return net.call(x, state or net.initial(), shared=self.shared if state else ())
        kept = {} if kept is None or self.shared else kept
        for state in list(self.tasks.values())[kept.get("tasks", 0) :]:
            answer, score = self._answer(net, x, state)
            best, chosen, least = kept.get("answers", (answer, answer, score))
            nearer = score < least
            chosen = torch.where(nearer.view(-1, *[1] * (answer.ndim - 1)), answer, chosen)
            kept["answers"] = torch.maximum(best, answer), chosen, torch.where(nearer, score, least)
            kept["tasks"] = kept.get("tasks", 0) + 1
        best, chosen, _ = kept["answers"]
        return torch.maximum(best - NOT_CHOSEN, chosen).clamp(min=-2 * NOT_CHOSEN)

    def _answer(self, net: Modulated, x: Tensor, state: TaskState) -> tuple[Tensor, Tensor]:
        """A finished task's log probabilities of all classes, and how badly it fits each row (N,)."""
        statistics, shared = self.infer == "statistics", {"shared": self.shared}
        logits, score = net.compared(x, state, **shared) if statistics else (net.call(x, state, **shared), None)
        answer = logits[..., list(state.classes)].float().log_softmax(-1)
        if score is None:
            if len(state.classes) == 1:
                raise ValueError(f"infer: the answer of one class {state.classes} has no entropy; use 'statistics'")
            entropy = F.softmax(answer, -1).mul(-answer).sum(-1) / log(len(state.classes))
            score = entropy.reshape(len(x), -1).mean(1)
        wide = answer.new_full((*answer.shape[:-1], len(self.setting.criterion.first_task)), -torch.inf)
        wide[..., list(state.classes)] = answer
        return wide, score

    @torch.no_grad()
    def _nearest(self, net: Modulated, task: Task) -> TaskState | None:
        """The finished task whose features serve a new one best, None for the backbone's own."""
        rows = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))[:LOOK]
        some = self._prepared(task, task.train, rows)
        answers = (some.y[..., None] == torch.tensor(task.classes, device=some.y.device)).double().flatten(0, -2)
        half = len(answers) // 2
        errors: dict[int | None, float] = {}
        for number in (None, *self.trained):
            state = net.initial() if number is None else self.trained[number]
            f = F.pad(features(net.folded(state), some.x).double().flatten(0, -2), (0, 1), value=1.0)
            fit = ridge(f[:half], answers[:half], 0.01)
            errors[number] = float((f[half:] @ fit - answers[half:]).square().mean())
        best = min(errors, key=lambda number: errors[number])
        return None if best is None else self.trained[best]


def _modulated(model: nn.Module) -> Modulated:
    if not isinstance(model, Modulated):
        remedy = "pass Modulated(model, Modulation(4, 4)), or partial(modulated, model=...), or --rule Modulation"
        raise TypeError(f"model: PerTask needs a Modulated and got a {type(model).__name__}; {remedy}")
    return model

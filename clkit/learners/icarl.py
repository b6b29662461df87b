"""iCaRL: exemplars by herding, distillation, and the nearest mean of exemplars."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize, one_hot

from clkit.data import Batch, Task
from clkit.evaluation import outputs
from clkit.learners.base import Setting, named, under
from clkit.learners.er import ER
from clkit.models import features
from clkit.weights import get_weights

BEYOND = 5.0  # a squared distance that no two vectors of length one have


@dataclass
class ICaRL(ER):
    """Learns with the last task's network as a teacher for old classes, and predicts the nearest mean of exemplars.

    Rebuffi et al. 2017 (arXiv 1611.07725). The memory is filled after a task by herding (algorithm 4) with the trained
    network's features of length one, and shared equally between classes. The loss is the binary cross entropy of the
    sigmoid outputs, summed over the classes seen so far and averaged over rows,
    sum_new [1(y = c) log g_c + 1(y != c) log (1 - g_c)] + sum_old [q_c log g_c + (1 - q_c) log (1 - g_c)], negated: the
    labels decide about this task's classes and the teacher's outputs q about those of earlier tasks, whatever label
    space the training asks for. A prediction is the class whose mean of exemplar features is nearest, all features and
    means of length one; the logits are the negative squared distances, and a class without exemplars comes last.

    The paper passes over the union of new rows and exemplars; here a step's rows are joined by `batch` exemplars, as in
    ER, so that each exemplar is seen more often. The teacher is the network that training went on from, the means
    belong to the deployed one; before there are any, the network's own logits predict. Classes must not come again
    (domain streams): they would be old and new at once.
    """

    policy: str = field(default="herding", init=False, repr=False)

    def start(self, setting: Setting) -> None:
        """Begins without a teacher and without exemplars."""
        if (setting.criterion.member.sum(0) > 1).any():
            raise ValueError(
                "stream: some classes come in more than one task, and iCaRL tells old classes from new ones; "
                "use ER or BiC there"
            )
        super().start(setting)
        self.teacher: dict[str, Tensor] = {}
        self.means = torch.zeros(0, 0)
        self.known = torch.zeros(0, dtype=torch.bool)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Binary cross entropy over the seen classes for the current and the replayed rows."""
        batch = self.replayed(batch)
        member, now = self.setting.criterion.member, batch.task.index
        logits = model(batch.x).float()
        target = one_hot(batch.y, self.setting.classes).float()
        if self.teacher:
            target = torch.where(member[:now].any(0), outputs(model, self.teacher, batch.x).float().sigmoid(), target)
        losses = binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (losses * member[: now + 1].any(0)).sum(-1).mean()

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Takes the next task's teacher."""
        self.teacher = get_weights(model)

    def calibrate(self, model: nn.Module, task: Task) -> None:
        """Takes the mean of every class's exemplars, as the deployed network represents them."""
        exemplars = self.examples(task)
        if len(exemplars):
            represented = normalize(features(model, exemplars.x).float())
            member = one_hot(exemplars.y, self.setting.classes).float()
            self.means, self.known = normalize(member.T @ represented), member.any(0)

    def predict(self, model: nn.Module, x: Tensor, task: Task | None = None) -> Tensor:
        """Negative squared distances from the classes' means; the model's logits before there are means."""
        if not len(self.means):
            return model(x)
        distance = torch.cdist(normalize(features(model, x).float()), self.means).square()
        return -torch.where(self.known, distance, BEYOND)

    def state_dict(self) -> dict[str, Tensor]:
        """The generator, the memory, the teacher and the means."""
        mine = {"means": self.means, "known": self.known}
        return super().state_dict() | named("teacher", self.teacher) | mine

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self.teacher, self.means, self.known = under("teacher", state), state["means"], state["known"]

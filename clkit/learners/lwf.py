"""Learning without forgetting."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clkit.data import Batch, Task
from clkit.evaluation import outputs, side_pass
from clkit.learners.base import Learner, Setting, named, under
from clkit.weights import get_weights


@dataclass
class LwF(Learner):
    """Learning without forgetting: the network before a task teaches its answers about earlier classes on new data.

    Li & Hoiem 2016 (arXiv 1606.09282): loss + strength T^2 KL(teacher || student) on the current batch, where both
    are softmax over the classes of earlier tasks at `temperature` T. The teacher is the network, in evaluation mode,
    with the weights that training went on from; KL in place of the paper's cross entropy has the same gradient and is
    zero at the teacher, and T^2 (Hinton et al. 2015, arXiv 1503.02531) keeps the gradient's scale. The paper gives
    each task a head of its own and sums the distances of all old heads: so it is with `Training(labels="task")`, a
    softmax over each earlier task's classes. In the other label spaces it is one softmax over all earlier classes. The
    paper's warm-up, in which only a new head is trained, is left out.
    """

    strength: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength: {self.strength!r}; give a number, at least 0")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature!r}; give a number above 0")

    def start(self, setting: Setting) -> None:
        """Begins without a teacher."""
        super().start(setting)
        self.teacher: dict[str, Tensor] = {}
        self.know(torch.zeros(0, dtype=torch.int64, device=setting.generator.device))

    def know(self, classes: Tensor) -> None:
        """Makes these the earlier classes, in heads: those that compete with each other, as in the loss or all."""
        self.known, self.heads = classes, [classes]
        criterion = self.setting.criterion
        if criterion.labels == "task" and (spaces := criterion.space(classes)) is not None:
            self.heads = [space.nonzero().squeeze(1) for space in spaces.unique(dim=0)]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the batch, and from the second task on the distance to the teacher's answers."""
        logits = model(batch.x)
        loss = self.setting.criterion(logits, batch.y)
        return loss + self.distance(model, batch.x, logits) if self.teacher else loss

    def term(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """What this rule adds to a loss, by a pass of its own that moves no statistics; None without a teacher."""
        return self.distance(model, batch.x, side_pass(model, batch.x)) if self.teacher else None

    def distance(self, model: nn.Module, x: Tensor, logits: Tensor) -> Tensor:
        """strength T^2 KL(teacher || student) summed over old heads, the mean over rows; the student gave `logits`."""
        teacher = outputs(model, self.teacher, x)
        pairs = ((a.index_select(-1, head) for a in (teacher, logits)) for head in self.heads)
        kl = torch.stack([self.divergence(*pair) for pair in pairs]).sum()
        return self.strength * self.temperature**2 * kl

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """KL(teacher || student) of the softmax of logits at the temperature, the mean over rows."""
        old, new = (
            (answers.float() / self.temperature).log_softmax(-1).flatten(0, -2) for answers in (teacher, student)
        )
        return nn.functional.kl_div(new, old, reduction="batchmean", log_target=True)

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Takes the teacher."""
        self.teacher = get_weights(model)
        self.know(torch.cat([self.known, torch.tensor(task.classes, device=self.known.device)]).unique())

    def state_dict(self) -> dict[str, Tensor]:
        """The generator, the teacher and the classes it knows."""
        return super().state_dict() | named("teacher", self.teacher) | {"known": self.known}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self.teacher = under("teacher", state)
        self.know(state["known"])

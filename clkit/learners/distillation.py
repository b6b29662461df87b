"""Rules that hold on to earlier answers: to logits stored with examples, or to those of the network before a task."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss

from clkit import checks, weights
from clkit.data import Batch, Examples, Task
from clkit.evaluation import EVALUATION_BATCH, outputs
from clkit.learners.base import Learner, Setting
from clkit.learners.rehearsal import ER
from clkit.memory import StepPolicy
from clkit.modules import evaluation_mode, side_pass


@dataclass
class DERpp(ER):
    """Replays the logits that stored examples had when they were stored, and the labels of others.

    Dark experience replay, DER++: Buzzega et al. 2020 (arXiv 2004.07211), equation 6: L(current) +
    alpha |h(x') - z'|^2 + beta L(x'', y''), with two draws from the memory, x' and x''. The square is a mean over
    classes, as in the authors' code. A term whose weight is 0 draws nothing, so with both at 0 this is fine-tuning. One
    forward pass serves all three, so BatchNorm sees them together.

    Rows are offered as in ER, each time with the logits that the training pass gave: samples along the path of
    training. When a consolidation changes the weights the logits are those of a network that is no more. `refresh` then
    takes them from the new weights, in evaluation mode (with released code that made DER collapse).
    """

    alpha: checks.NotNegative = 0.1
    beta: checks.NotNegative = 0.5
    refresh: bool = False
    policy: StepPolicy = "reservoir"  # pyright: ignore[reportIncompatibleVariableOverride]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy, plus the distance to stored logits, plus cross entropy of replayed rows: a scalar."""
        weighed = [weight for weight in (self.alpha, self.beta) if weight and len(self.store)]
        count = self.batch or self.setting.batch
        draws = [self.store.sample(count, self.setting.generator) for _ in weighed]
        joined = batch
        for rows in draws:
            joined = joined.join(rows["x"], rows["y"])
        logits = model(joined.x)
        current, *replayed = logits.split([batch.size, *(len(rows["y"]) for rows in draws)])
        self.current = current.detach().float()
        loss = self.setting.criterion(current, batch.y)
        if self.alpha and draws:
            loss = loss + self.alpha * mse_loss(replayed[0], draws[0]["logits"])
        if self.beta and draws:
            loss = loss + self.beta * self.setting.criterion(replayed[-1], draws[-1]["y"])
        return loss

    def stored(self, task: Task, examples: Examples) -> dict[str, Tensor]:
        """What the memory keeps of the current rows: with the logits that they were trained with, (n, ...)."""
        return super().stored(task, examples) | {"logits": self.current}

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Notes the weights, to see whether a consolidation changes them."""
        if self.refresh:
            self.trained = weights.get_weights(model)

    @torch.no_grad()
    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """With `refresh`, takes the stored logits anew if the weights are not those just trained."""
        if self.refresh and not weights.equal(self.trained or {}, weights.live_tensors(model)):
            rows = {name: tensor[: len(self.store)] for name, tensor in self.store.rows.items()}
            with evaluation_mode(model):
                fresh = [model(task.prepare(x)) for x in rows["x"].split(EVALUATION_BATCH)]
            rows["logits"].copy_(torch.cat(fresh))
        self.trained = None


@dataclass
class DER(DERpp):
    """Replays the logits that stored examples had when they were stored.

    DER, Buzzega et al. 2020 (arXiv 2004.07211), equation 5: L(current) + alpha |h(x') - z'|^2; DER++ without labels.
    """

    beta: Annotated[float, checks.Range(0, 0, means="as DER replays no labels; use DERpp to replay them")] = 0.0


@dataclass
class LwF(Learner):
    """Learning without forgetting: the network before a task teaches its answers about earlier classes on new data.

    Li & Hoiem 2016 (arXiv 1606.09282): loss + strength T^2 KL(teacher || student) on the current batch, where both
    are softmax over the classes of earlier tasks at `temperature` T. The teacher is the network, in evaluation mode,
    with the weights that training went on from. KL in place of the paper's cross entropy has the same gradient and is
    zero at the teacher; T^2 (Hinton et al. 2015, arXiv 1503.02531) keeps the gradient's scale.

    The paper gives each task a head of its own and sums the distances of all old heads: so it is with
    `Training(labels="task")`, a softmax over each earlier task's classes. In the other label spaces it is one softmax
    over all earlier classes. The paper's warm-up, in which only a new head is trained, is left out. CLeWI's code has
    it, takes the teacher's answers once, on rows that are not augmented, and has no factor T^2.
    """

    strength: checks.NotNegative = 1.0
    temperature: checks.Positive = 2.0
    state: ClassVar[tuple[str, ...]] = ("teacher", "known", "heads")

    def start(self, setting: Setting) -> None:
        """Begins without a teacher."""
        super().start(setting)
        self.teacher: dict[str, Tensor] = {}
        self.known = torch.zeros(0, dtype=torch.int64, device=setting.generator.device)
        self.heads: list[Tensor] = []

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the batch, and from the second task on the distance to the teacher's answers: a scalar."""
        logits = model(batch.x)
        loss = self.setting.criterion(logits, batch.y)
        return loss + self.distance(model, batch.x, logits) if self.teacher else loss

    def term(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """What this rule adds to a loss, by a pass of its own that moves no statistics; None without a teacher."""
        return self.distance(model, batch.x, side_pass(model, batch.x)) if self.teacher else None

    def distance(self, model: nn.Module, x: Tensor, logits: Tensor) -> Tensor:
        """strength T^2 KL(teacher || student), summed over old heads, the mean over rows: a scalar.

        `logits` (N, C) or (N, L, C) are the student's for prepared inputs `x` (N, ...).
        """
        teacher = outputs(model, self.teacher, x)
        kl = []
        for head in self.heads:
            softened = (a.index_select(-1, head).float() / self.temperature for a in (teacher, logits))
            old, new = (a.log_softmax(-1).flatten(0, -2) for a in softened)
            kl.append(kl_div(new, old, reduction="batchmean", log_target=True))
        return self.strength * self.temperature**2 * torch.stack(kl).sum()

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Takes the teacher, and the earlier classes in heads: those that compete in the loss, or all in one."""
        self.teacher = weights.get_weights(model)
        self.known = torch.cat([self.known, torch.tensor(task.classes, device=self.known.device)]).unique()
        self.heads, criterion = [self.known], self.setting.criterion
        if criterion.labels == "task" and (spaces := criterion.space(self.known)) is not None:
            self.heads = [space.nonzero().squeeze(1) for space in spaces.unique(dim=0)]

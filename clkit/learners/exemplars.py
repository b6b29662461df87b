"""Rules around exemplars: they choose what a memory holds with care, and predict or train by it after each task."""

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize, one_hot

from clkit import checks
from clkit.curvature import trainable
from clkit.data import Batch, Task, cuts
from clkit.evaluation import outputs
from clkit.learners.base import Learner, Setting
from clkit.learners.rehearsal import ER
from clkit.memory import Memory, Policy, check_policy
from clkit.models import features
from clkit.weights import Weights, get_weights, set_weights

BEYOND = 5.0  # a squared distance that no two vectors of length one have
MOMENTUM, WEIGHT_DECAY, CLIP = 0.9, 1e-6, 10.0  # of GDumb's SGD
TEMPERATURE = 2.0  # of BiC's distillation


@dataclass
class ICaRL(ER):
    """Learns with the last task's network as a teacher for old classes, and predicts the nearest mean of exemplars.

    Rebuffi et al. 2017 (arXiv 1611.07725). The memory is filled after a task by herding (algorithm 4) with the trained
    network's features of length one, and shared equally between classes. The loss is the binary cross entropy of the
    sigmoid outputs g, summed over the classes seen so far and averaged over rows:

    -sum_new [1(y = c) log g_c + 1(y != c) log (1 - g_c)] - sum_old [q_c log g_c + (1 - q_c) log (1 - g_c)]

    The labels decide about this task's classes and the teacher's outputs q about those of earlier tasks, whatever label
    space the training asks for. A prediction is the class whose mean of exemplar features is nearest, all features and
    means of length one. The logits are the negative squared distances, and a class without exemplars comes last.

    The paper passes over the union of new rows and exemplars. Here a step's rows are joined by `batch` exemplars, as in
    ER, so that each exemplar is seen more often. The teacher is the network that training went on from. The means
    belong to the deployed one; before there are any, the network's own logits predict. Classes must not come again
    (domain streams): they would be old and new at once.
    """

    policy: Policy = field(default="herding", init=False, repr=False)
    once: bool = field(default=True, init=False, repr=False)
    state: ClassVar[tuple[str, ...]] = ("teacher", "means", "known")

    def start(self, setting: Setting) -> None:
        """Begins without a teacher and without exemplars. Raises ValueError if classes come in more than one task."""
        if (setting.criterion.member.sum(0) > 1).any():
            raise ValueError("stream: some classes come in more than one task, old and new; use ER or BiC there")
        super().start(setting)
        self.teacher: dict[str, Tensor] = {}
        self.means = torch.zeros(0, 0)
        self.known = torch.zeros(0, dtype=torch.bool)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Binary cross entropy over the seen classes for the current and the replayed rows."""
        batch = self.replayed(model, batch)
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


@dataclass
class GDumb(ER):
    """Greedily balances a memory, trains nothing on the stream, and fits a fresh network to the memory after each task.

    Prabhu et al. 2020 (ECCV, "GDumb: a simple approach that questions our progress in continual learning"). The steps
    of the stream only offer rows to the memory; their loss is zero. After a task the network goes back to the weights
    that it had before the first one and is trained for `fit_epochs` on the memory. It is trained by SGD (momentum 0.9,
    weight decay 1e-6, gradients clipped to norm 10) in batches of `batch` (None: the stream's).

    As in the released code, a first epoch has a tenth of `max_lr`. Then the learning rate falls from `max_lr` to
    `min_lr` by a cosine that starts afresh in epochs 1, 2, 4, 8, ... (SGDR, Loshchilov and Hutter 2017); 2^k epochs end
    with a whole cycle. With probability `cutmix` a batch of images is mixed (CutMix, Yun et al. 2019,
    arXiv 1905.04899): a box of each image is replaced by another image's, and the loss shared out by area. There is one
    box a batch, its area
    uniform in [0, 1] but for the border. The paper fits once, for the last task; here after each, so that there is an
    accuracy for each. CLeWI's code fills a reservoir in every epoch instead, and does not clip.
    """

    policy: Policy = field(default="balanced", init=False, repr=False)
    once: bool = field(default=True, init=False, repr=False)
    fit_epochs: checks.Count = 256
    max_lr: checks.Positive = 0.05
    min_lr: checks.Positive = 5e-4
    cutmix: checks.Share = 0.5
    state: ClassVar[tuple[str, ...]] = ("initial",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr: {self.min_lr!r} with max_lr={self.max_lr!r}; give at most max_lr")

    def start(self, setting: Setting) -> None:
        """Begins with an empty memory and no weights to go back to."""
        super().start(setting)
        self.initial: dict[str, Tensor] = {}
        self.augments = False

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Keeps the weights that the first task begins with."""
        super().begin_task(model, task)
        if not self.initial:
            self.initial = get_weights(model)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Zero, whatever the weights: no forward pass, so that statistics stay too."""
        self.augments = batch.generator is not None
        return torch.stack([p.sum() for p in trainable(model).values()]).sum() * 0

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Fits the memory from the initial weights."""
        set_weights(model, self.initial)
        if len(self.store):
            self.fit(model, task)

    def fit(self, model: nn.Module, task: Task) -> None:
        """Trains the model on the memory but for what is held out of it."""
        rows, generator, criterion = self.store.all(), self.setting.generator, self.setting.criterion
        parameters = list(trainable(model).values())
        optimizer = torch.optim.SGD(parameters, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        for epoch in range(self.fit_epochs):
            optimizer.param_groups[0]["lr"] = self.rate(epoch)
            order = torch.randperm(len(rows["y"]), generator=generator, device=generator.device)
            for part in order.tensor_split([*cuts(len(order), self.batch or self.setting.batch)]):
                x, y = task.prepare(rows["x"][part], generator if self.augments else None), rows["y"][part]
                if self.cutmix and x.ndim == 4:
                    x, other, share = cutmix(x, self.cutmix, generator)
                    logits = model(x)
                    loss = share * criterion(logits, y) + (1 - share) * criterion(logits, y[other])
                else:
                    loss = criterion(model(x), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch of the fit."""
        if epoch == 0:
            return 0.1 * self.max_lr
        length = 2 ** (epoch.bit_length() - 1)
        share = (epoch - length) / length
        return self.min_lr + (self.max_lr - self.min_lr) * (1 + math.cos(math.pi * share)) / 2


def cutmix(x: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces one box of all images by that of others, with some probability: mixed images, the others, own share.

    Images are (N, C, H, W); `others` (N,) says whose box each has got, `share` which part of the area is still its own.
    """
    height, width = x.shape[2:]
    other = torch.randperm(len(x), generator=generator, device=x.device)
    draw, own, down, right = torch.rand(4, generator=generator, device=x.device)
    half = (1 - own).sqrt() / 2

    def between(size: int, centre: Tensor) -> Tensor:
        return ((torch.arange(size, device=x.device) + 0.5) / size - centre).abs() < half

    box = between(height, down)[:, None] & between(width, right) & (draw < probability)
    return torch.where(box, x[other], x), other, 1 - box.float().mean()


@dataclass
class BiC(ER):
    """Distils the last network while learning, then scales and shifts the newest classes' logits to fit held-back rows.

    Wu et al. 2019 (arXiv 1905.13260). A share `validation` of each class's rows is never trained on. A step minimises
    (1 - lambda) CE + lambda D over the current and the replayed rows. D is the cross entropy between the softened
    outputs (temperature 2) of teacher and model, over the teacher's classes. The teacher is the last network with its
    own correction; the first task has none. lambda = n_old / (n_old + n_new) counts classes, with `weighting` "paper".
    "mammoth" is what Mammoth's code does, from which CLeWI's tables come: lambda = 1 / t in the t-th task, which falls
    where the paper's rises, and D times the temperature's square.

    Afterwards the logits o of the newest task's classes become a o + b, and all others stay. (a, b) minimise the cross
    entropy over the seen classes on the validation rows kept in memory, equally many of each class. The memory is
    divided as the data are: `validation` of it holds validation rows (one for each class at least, if half of it
    suffices).

    With `bias_epochs` that many passes of Adam at a rate of 0.001 look for them from (1, 0), 250 in Mammoth's code, in
    batches of the training's size. They stop short where validation rows are few and told apart perfectly, so that
    there is no minimum. By default, 0, L-BFGS finds the minimum, from logits computed once, with
    ((a - 1)^2 + b^2) / 2 added to the sum over rows. This is a unit normal prior, which many rows outweigh. It is not
    in the paper. That there is one, and its width, were chosen after looking at test accuracy on scikit-learn's digits:
    BiC's accuracies there may be flattered by it.

    Mammoth's code has no validation memory: from the second task on it draws a share of the memory for validation, and
    as many of the task's rows; exemplars are the first rows of a task, not random ones. Rows of a batch that are not
    trained on have weight 0, though BatchNorm's statistics see their inputs. The teacher's correction is fitted to the
    weights that training goes on from, that of predictions to the deployed ones. A consolidation that asks for a
    holdout gets the validation rows, and nothing else is held out. Where classes come again (domain streams), n_old
    counts a class once for each task that had it. D is then over all earlier classes, and without new classes nothing
    is corrected.
    """

    memory: Annotated[int, checks.Range(2, means="an exemplar and a validation row")] = 500
    policy: Policy = field(default="balanced", init=False, repr=False)
    once: bool = field(default=True, init=False, repr=False)
    validation: Annotated[float, checks.Range(0, 1, "both", "of the rows, not trained on")] = 0.1
    weighting: Literal["paper", "mammoth"] = "paper"
    bias_epochs: checks.Index = 0
    state: ClassVar[tuple[str, ...]] = ("teacher", "correction", "teacher_correction")

    def start(self, setting: Setting) -> None:
        """Begins with two empty memories, without a teacher and with corrections that change nothing."""
        Learner.start(self, setting)
        check_policy(self.policy, setting.criterion.labelled)
        few = max(1, round(self.memory * self.validation))
        apart = min(max(few, min(setting.classes, self.memory // 2)), self.memory - 1)
        self.store = Memory(self.memory - apart, self.policy)
        self.reserve, self.apart = Memory(apart, self.policy), torch.zeros(0, dtype=torch.bool)
        self.teacher: dict[str, Tensor] = {}
        self.correction = self.teacher_correction = self._identity()

    def _drawn_apart(self, task: Task) -> Tensor:
        """A mask of the rows that are not trained on: a share of each class, at least one of a class that has two."""
        y, generator = task.train.y, self.setting.generator
        apart = torch.zeros(len(y), dtype=torch.bool, device=generator.device)
        for label in task.classes:
            rows = (y == label).nonzero().squeeze(1).to(generator.device)
            order = torch.randperm(len(rows), generator=generator, device=generator.device)
            count = min(max(1, round(len(rows) * self.validation)), max(0, len(rows) - 1))
            apart[rows[order[:count]]] = True
        return apart

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy and distillation, the mean over the current rows that are trained on and the replayed ones."""
        joined = self.replayed(model, batch)
        weight = torch.ones(len(joined.y), device=joined.x.device)
        weight[: batch.size] = (~self.apart[batch.rows]).to(weight, non_blocking=True)
        logits = model(joined.x)
        losses = self.setting.criterion(logits, joined.y, "none")
        if self.teacher:
            taught = self._corrected(outputs(model, self.teacher, joined.x), self.teacher_correction)
            counts, now = self.setting.criterion.member.sum(1), batch.task.index
            share, scale = counts[:now].sum() / counts[: now + 1].sum(), 1.0  # lambda
            if self.weighting == "mammoth":
                share, scale = 1 / (now + 1), TEMPERATURE**2
            losses = (1 - share) * losses + share * scale * self._distillation(logits, taught, batch.task)
        return (weight * losses).sum() / weight.sum().clamp(min=1)

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Nothing: the memories are filled after training."""

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Offers the rows trained on to the exemplars, and the others to the validation memory."""
        self.offer(task)

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

    def _identity(self) -> Tensor:
        device, classes = self.setting.generator.device, self.setting.classes
        return torch.stack([torch.ones(classes, device=device), torch.zeros(classes, device=device)])

    def _corrected(self, logits: Tensor, correction: Tensor) -> Tensor:
        """Logits (N, C) times the first row of a correction (2, C), plus the second."""
        return logits.float() * correction[0] + correction[1]

    def _distillation(self, logits: Tensor, taught: Tensor, task: Task) -> Tensor:
        """Cross entropy, row by row, from the teacher's softened outputs to the model's, over the old classes."""
        new = ~self.setting.criterion.member[: task.index].any(0)
        target = (taught / TEMPERATURE).masked_fill(new, float("-inf")).softmax(-1)
        log_p = (logits.float() / TEMPERATURE).masked_fill(new, float("-inf")).log_softmax(-1)
        return -(target * log_p.masked_fill(new, 0)).sum(-1)

    def _fit(self, model: nn.Module, weights: Weights, task: Task) -> Tensor:
        """The correction (2, C) of weights after a task: what `fitted_bias` finds, for its new classes."""
        member, now, identity = self.setting.criterion.member, task.index, self._identity()
        seen, old, rows = member[: now + 1].any(0), member[:now].any(0), self.held_out(task)
        new = seen & ~old
        if rows is None or not old.any() or not new.any():
            return identity
        logits = outputs(model, weights, rows.x)[:, seen].double()
        y = (seen.cumsum(0) - 1)[rows.y]
        ab = fitted_bias(logits, y, new[seen], epochs=self.bias_epochs, batch=self.setting.batch)
        return torch.where(new, ab[:, None].float(), identity)


@torch.enable_grad()
def fitted_bias(logits: Tensor, y: Tensor, new: Tensor, epochs: int = 0, batch: int = 32) -> Tensor:
    """The (a, b) for which a o + b in the `new` classes (a mask) has the least cross entropy: (2,), found by L-BFGS.

    `logits` are (N, C), `y` (N,), `new` (C,). The loss is convex; ((a - 1)^2 + b^2) / 2 is added to its sum over rows,
    so that there is exactly one minimum. With `epochs` it is instead what so many passes of Adam come to, in batches in
    order, without that term.
    """
    identity = torch.tensor([1.0, 0.0], dtype=logits.dtype, device=logits.device)
    ab = identity.clone().requires_grad_()

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(torch.where(new, logits * ab[0] + ab[1], logits), y)

    if epochs:
        stepper = torch.optim.Adam([ab], lr=1e-3)
        for part in list(zip(logits.split(batch), y.split(batch), strict=True)) * epochs:
            stepper.zero_grad()
            loss(*part).backward()
            stepper.step()
        return ab.detach()
    optimizer = torch.optim.LBFGS(
        [ab], max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss(logits, y) + (ab - identity).square().sum() / (2 * len(y))
        total.backward()
        return total

    optimizer.step(closure)
    return ab.detach()

"""Rules that see earlier tasks' examples again: from a memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clkit import checks
from clkit.curvature import trainable
from clkit.data import Batch, Examples, Rows, Task
from clkit.evaluation import EVALUATION_BATCH, outputs
from clkit.learners.base import Learner, Setting
from clkit.memory import Memory, Policy, check_policy, herding
from clkit.models import features
from clkit.modules import side_pass


@dataclass
class ER(Learner):
    """Experience replay: every step also minimises the loss of a batch drawn from a memory of earlier examples.

    Ratcliff 1990; Robins 1995; in this form Chaudhry et al. 2019 (arXiv 1902.10486): one cross entropy over the
    current rows and the memory's, concatenated. `memory` is the number of examples kept, `batch` the number replayed
    a step (None: as many as the step's own), `policy` which ones stay (see `Memory`). Rows are stored as they are and
    augmented afresh whenever they are replayed.

    The papers see each example once, and leave open what several epochs offer to the memory. The released code, and
    Mammoth's, offer the current rows after every step of every epoch, as here. A row is then stored anew in each epoch,
    perhaps twice at a time, and early in a task the memory is nearly all of earlier ones. With `once` a row is offered
    in its first epoch alone. With "herding" it is offered at the end of the task, in the order that the trained
    network's features give.

    A holdout is a memory beside the other, with that share of the room. Which share of a task's rows may enter it, and
    it alone, is drawn as the task begins: so no copy of a held-out row is ever replayed.
    """

    memory: checks.Count = 500
    batch: checks.Count | None = None
    policy: Policy = "reservoir"
    once: bool = False
    remembers: ClassVar[bool] = True
    state: ClassVar[tuple[str, ...]] = ("store", "reserve", "apart")

    def start(self, setting: Setting) -> None:
        """Begins with an empty memory.

        Raises ValueError where less than one example would be held out of it, and for labels that it cannot sort by.
        """
        super().start(setting)
        check_policy(self.policy, setting.criterion.labelled)
        held = int(self.memory * setting.holdout)
        if setting.holdout and not held:
            few = f"{setting.holdout!r} of {self.memory} is less than one example"
            raise ValueError(f"holdout: {few}; give more of either")
        self.store = Memory(self.memory - held, self.policy)
        self.reserve = Memory(held, self.policy) if held else None
        self.apart = torch.zeros(0, dtype=torch.bool)

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Refuses a network without the features that herding goes by."""
        if self.policy == "herding":
            features(model, x)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Draws the rows that may be held out, as a mask `apart`."""
        if self.reserve is not None:
            self.apart = self._drawn_apart(task)

    def replayed(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with rows drawn from the memory joined to it."""
        if not len(self.store):
            return batch
        rows = self.store.sample(self.batch or self.setting.batch, self.setting.generator)
        return batch.join(rows["x"], rows["y"])

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Offers the current rows to the memory, unless they are to be herded or were offered before."""
        if self.policy == "herding" or (self.once and batch.epoch):
            return
        rows = self.stored(batch.task, Examples(batch.raw, batch.y))
        for store, mine in self._parts(batch.rows):
            store.offer(self.setting.generator, **{name: tensor[mine] for name, tensor in rows.items()})

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Offers the task's rows in the order of herding, if that is the policy."""
        if self.policy == "herding":
            self.offer(task, self._herded(model, task))

    def offer(self, task: Task, rows: Tensor | None = None) -> None:
        """Offers a task's training rows to the memory: all, or those whose numbers are `rows` (n,), in order."""
        device = self.setting.generator.device
        chosen = torch.arange(len(task.train), device=device) if rows is None else rows
        for store, mine in self._parts(chosen):
            for part in _chunks(task.train, device, chosen[mine]):
                store.offer(self.setting.generator, **self.stored(task, part))

    def _parts(self, numbers: Rows | None) -> list[tuple[Memory, Tensor | slice]]:
        """The memory, and the one for what is held out if there is one; which of a task's rows may enter each."""
        if self.reserve is None:
            return [(self.store, slice(None))]
        apart = self.apart[numbers]
        return [(self.store, ~apart), (self.reserve, apart)]

    def _drawn_apart(self, task: Task) -> Tensor:
        """A mask of a task's rows that are held out of replay: a share of them, at least one of two."""
        count, generator = len(task.train), self.setting.generator
        few = min(max(1, round(count * self.setting.holdout)), count - 1)
        return torch.randperm(count, generator=generator, device=generator.device) < few

    def stored(self, task: Task, examples: Examples) -> dict[str, Tensor]:
        """What the memory keeps of a task's examples, raw: tensors (n, ...) by name."""
        return {"x": examples.x, "y": examples.y}

    def examples(self, task: Task) -> Examples:
        """The memory but for what is held out of it, prepared and not augmented."""
        return self._recalled(task, self.store.all())

    def held_out(self, task: Task) -> Examples | None:
        """The part of the memory that is never replayed, prepared and not augmented; None if there is none."""
        return self._recalled(task, self.reserve.all()) or None if self.reserve is not None else None

    def _herded(self, model: nn.Module, task: Task) -> Tensor:
        """The numbers of a task's rows, the best fits to their class's mean feature first; features have length one."""
        device = self.setting.generator.device
        found = [features(model, task.prepare(part.x)) for part in _chunks(task.train, device)]
        return herding(normalize(torch.cat(found)), task.train.y.to(device), self.memory)

    def _recalled(self, task: Task, rows: dict[str, Tensor]) -> Examples:
        return self._prepared(task, Examples(rows["x"], rows["y"]) if rows else task.train[:0])


def _chunks(examples: Examples, device: torch.device, rows: Tensor | None = None) -> Iterator[Examples]:
    """Examples, or the given rows of them, on a device, some at a time: they may be on the host for want of room."""
    chosen = torch.arange(len(examples)) if rows is None else rows
    for part in chosen.to(examples.x.device).split(EVALUATION_BATCH):
        yield examples[part].to(device)


@dataclass
class MemoryOnly(ER):
    """Fine-tuning that fills a memory and replays nothing of it: consolidations see examples, training does not.

    "No rehearsal" in CLeWI's experiments (arXiv 2404.04002). First of a `Sum`, it lends its memory to rules that keep
    none, as in `Sum(MemoryOnly(50), EWC())`.
    """

    def replayed(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch alone."""
        return batch


@dataclass
class ERACE(ER):
    """Experience replay whose current rows do not compete with the classes of earlier ones.

    ER-ACE, Caccia et al. 2022 (arXiv 2104.05025): L(current; some classes) + L(replayed; all classes). New classes then
    no longer push the old ones' logits down at the start of a task. Which classes the current rows compete among is
    `among`:

    - "unseen", Mammoth's code, from which CLeWI's tables come: the classes of the batch and those that no batch has
      had yet. The first task is plain and replays nothing. (That code takes the classes after the highest one seen,
      and that one, for unseen. It is the same where classes come in order and the highest is in every batch.)
    - "present", the paper's equation 3: the classes of the batch alone, and replay from the second step on

    The authors' code has "unseen" classes and replays in the first task, too. The paper gives replayed rows the classes
    seen so far; here they get the label space of `Training(labels=...)`, of which "seen" is that. One forward pass
    serves both, so BatchNorm sees them together, where released code makes two passes.
    """

    among: Literal["unseen", "present"] = "unseen"
    state: ClassVar[tuple[str, ...]] = ("seen",)

    def start(self, setting: Setting) -> None:
        """Begins with an empty memory and no class seen."""
        super().start(setting)
        self.seen = torch.zeros(setting.classes, dtype=torch.bool, device=setting.generator.device)

    def replayed(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with rows drawn from the memory joined to it; the batch alone in a first task that is plain."""
        return batch if self._plain(batch) else super().replayed(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy of the current rows among some classes, plus that of the replayed rows: a scalar."""
        joined = self.replayed(model, batch)
        logits = model(joined.x)
        present = (batch.y.flatten() == torch.arange(self.setting.classes, device=batch.y.device)[:, None]).any(1)
        self.seen = self.seen | present
        rivals = present if self.among == "present" else present | ~self.seen
        rivals = None if self._plain(batch) else rivals
        current = self.setting.criterion(logits[: batch.size], batch.y, among=rivals)
        if len(joined.y) == batch.size:
            return current
        return current + self.setting.criterion(logits[batch.size :], joined.y[batch.size :])

    def _plain(self, batch: Batch) -> bool:
        return self.among == "unseen" and batch.task.index == 0


@dataclass
class MIR(ER):
    """Experience replay of those stored examples whose loss would rise most by the step on the current rows.

    Maximally interfered retrieval, Aljundi et al. 2019 (arXiv 1908.04742), equation 1. `candidates` are drawn from the
    memory (None: twice as many as are replayed, as in CLeWI's runs). The `batch` of them with the largest
    loss(theta - lr gradient) - loss(theta) are replayed. theta - lr gradient is a virtual step of plain gradient
    descent on the current rows alone, at the step's learning rate.

    The losses are taken in evaluation mode, so that a candidate's does not depend on the others. The pass for the
    virtual step leaves BatchNorm's statistics as they were. (In CLeWI's released code gradients are cleared before they
    are read: all scores tie, and MIR is ER.)
    """

    candidates: checks.Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_candidates(self.batch or 1)

    def start(self, setting: Setting) -> None:
        """Begins with an empty memory. Raises ValueError if there are fewer candidates than are replayed a step."""
        super().start(setting)
        self._check_candidates(self.batch or setting.batch)

    def _check_candidates(self, count: int) -> None:
        if self.candidates is not None and self.candidates < count:
            raise ValueError(f"candidates: {self.candidates!r}, and {count} are replayed a step; give at least as many")

    def replayed(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with the most interfered candidates joined to it; all of them if they are not more."""
        if not len(self.store):
            return batch
        count = self.batch or self.setting.batch
        rows = self.store.sample(self.candidates or 2 * count, self.setting.generator)
        if len(rows["y"]) > count:
            worst = self.rises(model, batch, batch.prepare(rows["x"]), rows["y"]).topk(count).indices
            rows = {name: tensor[worst] for name, tensor in rows.items()}
        return batch.join(rows["x"], rows["y"])

    def rises(self, model: nn.Module, batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        """By how much the virtual step on the batch raises the loss of each example, prepared x (N, ...): (N,)."""
        parameters = trainable(model)
        loss = self.setting.criterion(side_pass(model, batch.x), batch.y)
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        with torch.no_grad():
            stepped = {n: p - batch.lr * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
            before, after = (self.setting.criterion(outputs(model, w, x), y, "none") for w in (parameters, stepped))
        return (after - before).view(len(y), -1).mean(1)

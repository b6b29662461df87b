"""Experience replay."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clkit.data import Batch, Examples, Task
from clkit.evaluation import EVALUATION_BATCH
from clkit.learners.base import Learner, Setting, named, under
from clkit.memory import Memory, check_policy, herding
from clkit.models import features


@dataclass
class ER(Learner):
    """Experience replay: every step also minimises the loss of a batch drawn from a memory of earlier examples.

    Ratcliff 1990; Robins 1995; in this form Chaudhry et al. 2019 (arXiv 1902.10486): one cross entropy over the
    current rows and the memory's, concatenated. `memory` is the number of examples kept, `batch` the number replayed
    a step (None: as many as the step's own), `policy` which ones stay (`memory.POLICIES`). Rows are stored as they are
    and augmented afresh whenever they are replayed. The papers leave open when an example is offered to the memory:
    here once, at the end of its first step, so that the reservoir is a uniform sample of the stream however many epochs
    there are; with "herding" at the end of the task, in the order that the trained network's features give.
    """

    memory: int = 500
    batch: int | None = None
    policy: str = "reservoir"
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Memory(self.memory, self.policy)
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch: {self.batch!r}; give the number of examples to replay a step, or None")

    def start(self, setting: Setting) -> None:
        """Begins with an empty memory."""
        super().start(setting)
        self.store = Memory(self.memory, self.policy, holdout=setting.holdout)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Refuses labels that the memory cannot sort by."""
        check_policy(self.policy, task.train.y)

    def replayed(self, batch: Batch) -> Batch:
        """The batch with rows of the memory joined to it."""
        if not len(self.store):
            return batch
        rows = self.store.sample(self.batch or self.setting.batch, self.setting.generator)
        return batch.join(rows["x"], rows["y"])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy over the current and the replayed rows."""
        return super().loss(model, self.replayed(batch))

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Offers the current rows to the memory in the task's first epoch, unless they are to be herded."""
        if batch.epoch == 0 and self.policy != "herding":
            self.store.offer(self.setting.generator, x=batch.raw, y=batch.y)

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Offers the task's rows in the order of herding, if that is the policy."""
        if self.policy == "herding":
            self.offer_herded(model, task)

    def offer_herded(self, model: nn.Module, task: Task) -> None:
        """Offers rows of the task, the best fits to their class's mean feature first; features have length one."""
        device = self.setting.generator.device
        parts = [features(model, task.prepare(part.x)) for part in portions(task.train, device)]
        order = herding(normalize(torch.cat(parts)), task.train.y.to(device), self.memory)
        for part in portions(task.train, device, order):
            self.store.offer(self.setting.generator, x=part.x, y=part.y)

    def examples(self, task: Task) -> Examples:
        """The memory but for what is held out of it, prepared and not augmented."""
        return self._prepared(task, self.store.all())

    def held_out(self, task: Task) -> Examples | None:
        """The part of the memory that is never replayed, prepared and not augmented; None if there is none."""
        rows = self.store.held_out()
        return self._prepared(task, rows) if rows and len(rows["y"]) else None

    def state_dict(self) -> dict[str, Tensor]:
        """The generator and the memory."""
        return super().state_dict() | named("memory", self.store.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self.store.load_state_dict(under("memory", state))

    def _prepared(self, task: Task, rows: dict[str, Tensor]) -> Examples:
        if not rows:
            return Examples(task.prepare(task.train.x[:0]), task.train.y[:0])
        return Examples(task.prepare(rows["x"]), rows["y"])


def portions(examples: Examples, device: torch.device, rows: Tensor | None = None) -> Iterator[Examples]:
    """Examples, or the given rows of them, on a device, some at a time: they may be on the host for want of room."""
    chosen = torch.arange(len(examples)) if rows is None else rows
    for part in chosen.to(examples.x.device).split(EVALUATION_BATCH):
        yield examples[part].to(device)

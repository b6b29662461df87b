"""A data buffer: a share of every task's data is kept and mixed in."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clkit.data import Batch, Task
from clkit.learners.base import Learner
from clkit.learners.joint import Joint

MIXINGS = ("concatenate", "half")


@dataclass
class DataBuffer(Joint):
    """Fine-tuning on the current task with a kept share of each earlier task's data mixed in: SFA's baseline.

    Kleiman et al. 2025 (arXiv 2501.05559) keep 5 to 10 % of the data; how they are mixed in is left open. Here a task
    takes as many steps, of as many rows, as without a buffer: replayed rows take the place of current ones. `share` is
    the part of a task's training rows that is kept, drawn at random when its training ends, rounded and at least one;
    0 keeps nothing, and is fine-tuning bit for bit.

    - `mixing` "concatenate": each row of a batch is, with probability buffer / (buffer + task), a random one of the
      buffer: on average that of batches from the two sets, joined and shuffled
    - "half": half of each batch, rounded down, are random rows of the buffer, however small it is

    The buffer holds the earlier tasks alone while a task is learned; a consolidation at its end sees the newest, too.
    No part of it can be held out for choosing settings by.
    """

    share: float = 0.05
    mixing: str = "concatenate"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: {self.share!r}; give the part of each task's data that is kept, in [0, 1]")
        if self.mixing not in MIXINGS:
            raise ValueError(f"mixing: {self.mixing!r} is unknown; choose one of {', '.join(MIXINGS)}")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the batch with rows of the buffer in the place of some of its own."""
        return Learner.loss(self, model, self.mixed(batch))

    def mixed(self, batch: Batch) -> Batch:
        """The batch with rows of the buffer in the place of some of its own; its `raw` stays."""
        if self.past is None:
            return batch
        generator, device, count = self.setting.generator, self.setting.generator.device, batch.size
        if self.mixing == "half":
            replaced = torch.arange(count, device=device) < count // 2
        else:
            probability = len(self.past) / (len(self.past) + len(batch.task.train))
            replaced = torch.rand(count, generator=generator, device=device) < probability
        rows = torch.randint(len(self.past), (count,), generator=generator, device=device).to(self.past.x.device)
        x, y = batch.prepare(self.past.x[rows]), self.past.y[rows].to(batch.y.device, non_blocking=True)
        return replace(batch, x=_choose(replaced, x, batch.x), y=_choose(replaced, y, batch.y))

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Keeps a share of the task's data."""
        if not self.share:
            return
        count, generator = max(1, round(self.share * len(task.train))), self.setting.generator
        rows = torch.randperm(len(task.train), generator=generator, device=generator.device)[:count]
        super().after_training(model, replace(task, train=task.train[rows.to(task.train.x.device)]))


def _choose(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The rows of `a` where `rows` is true, those of `b` elsewhere."""
    return torch.where(rows.view(-1, *[1] * (a.ndim - 1)), a, b)

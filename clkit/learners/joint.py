"""Rules that keep earlier tasks' data, all of them or a share, and train on them with the current task's."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from clkit import checks
from clkit.data import Batch, Examples, Task
from clkit.learners.base import Learner, Setting


@dataclass
class Joint(Learner):
    """Trains on the data of all tasks so far, all of which are kept: what continual learning is measured against.

    Each step's rows are joined by rows of the earlier tasks, in the proportion of their numbers: an epoch is one over
    everything seen. Training goes on from the previous task's weights, where the released baseline of CLeWI starts
    afresh with all classes at once.
    """

    state: ClassVar[tuple[str, ...]] = ("past",)

    def start(self, setting: Setting) -> None:
        """Begins with nothing."""
        super().start(setting)
        self.past: Examples | None = None

    def replayed(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with its share of earlier rows joined to it."""
        if self.past is None:
            return batch
        return batch.join(*self._drawn(self.past, round(batch.size * len(self.past) / len(batch.task.train))))

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Keeps the task's data."""
        self.past = Examples.cat([task.train] if self.past is None else [self.past, task.train])

    def examples(self, task: Task) -> Examples:
        """1,000 evenly spaced rows of everything kept, prepared."""
        return self._evenly(task, self.past if self.past is not None else task.train)

    def _drawn(self, past: Examples, count: int) -> tuple[Tensor, Tensor]:
        """Inputs, raw, and labels of `count` rows drawn with replacement."""
        device = self.setting.generator.device
        rows = torch.randint(len(past), (count,), generator=self.setting.generator, device=device)
        some = past[rows.to(past.x.device)].to(device)
        return some.x, some.y


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

    share: checks.Share = 0.05
    mixing: Literal["concatenate", "half"] = "concatenate"

    def replayed(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with rows of the buffer in the place of some of its own; its `raw` stays."""
        if self.past is None:
            return batch
        generator, device, count = self.setting.generator, self.setting.generator.device, batch.size
        if self.mixing == "half":
            replaced = torch.arange(count, device=device) < count // 2
        else:
            probability = len(self.past) / (len(self.past) + len(batch.task.train))
            replaced = torch.rand(count, generator=generator, device=device) < probability
        x, y = self._drawn(self.past, count)
        x, y = (
            torch.where(replaced.view(-1, *[1] * (own.ndim - 1)), kept, own)
            for kept, own in ((batch.prepare(x), batch.x), (y, batch.y))
        )
        return replace(batch, x=x, y=y)

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Keeps a share of the task's data."""
        if not self.share:
            return
        count, generator = max(1, round(self.share * len(task.train))), self.setting.generator
        rows = torch.randperm(len(task.train), generator=generator, device=generator.device)[:count]
        super().after_training(model, replace(task, train=task.train[rows.to(task.train.x.device)]))

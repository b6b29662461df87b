"""Joint training: the upper bound that keeps all data."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clkit.data import Batch, Examples, Task
from clkit.learners.base import Learner, Setting


@dataclass
class Joint(Learner):
    """Trains on the data of all tasks so far, all of which are kept: what continual learning is measured against.

    Each step's rows are joined by rows of the earlier tasks, in the proportion of their numbers, so that an epoch is
    one over everything seen. Training goes on from the previous task's weights, where the released baseline of CLeWI
    starts afresh with all classes at once.
    """

    def start(self, setting: Setting) -> None:
        """Begins with nothing."""
        super().start(setting)
        self.past: Examples | None = None

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the current rows and their share of earlier ones."""
        if self.past is not None:
            count = round(batch.size * len(self.past) / len(batch.task.train))
            generator, device = self.setting.generator, self.past.x.device
            rows = torch.randint(len(self.past), (count,), generator=generator, device=generator.device).to(device)
            batch = batch.join(*(part.to(batch.x.device) for part in (self.past.x[rows], self.past.y[rows])))
        return super().loss(model, batch)

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Keeps the task's data."""
        parts = [task.train] if self.past is None else [self.past, task.train]
        self.past = Examples.cat(parts)

    def examples(self, task: Task) -> Examples:
        """1,000 evenly spaced rows of everything kept, prepared."""
        return self._evenly(task, self.past if self.past is not None else task.train)

    def state_dict(self) -> dict[str, Tensor]:
        """The generator and all data kept."""
        return super().state_dict() | ({} if self.past is None else {"x": self.past.x, "y": self.past.y})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self.past = Examples(state["x"], state["y"]) if "x" in state else None

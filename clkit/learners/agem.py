"""Averaged gradient episodic memory."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clkit.data import Batch, Task
from clkit.learners.base import Learner
from clkit.learners.er import ER, portions


def flat_gradient(model: nn.Module, loss: Tensor | None = None) -> Tensor:
    """The gradient of a loss, or by default the one that the parameters hold, as one vector: (P,)."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    if loss is None:
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in wanted]
    else:
        parts = torch.autograd.grad(loss, wanted, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def set_gradient(model: nn.Module, flat: Tensor) -> None:
    """Gives the parameters the gradient that `flat_gradient` would return as `flat`."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p, part in zip(wanted, flat.split([p.numel() for p in wanted]), strict=True):
        p.grad = part.view_as(p)


@dataclass
class AGEM(ER):
    """Fine-tuning whose gradient is projected where it would raise the loss on a batch of earlier tasks' examples.

    A-GEM, Chaudhry et al. 2019 (arXiv 1812.00420), equation 11: with g the gradient of the current batch and r that of
    a batch from the memory, g <- g - min(0, g.r / r.r) r, so that g.r >= 0. Nothing is replayed. While a task is
    learned the memory holds earlier ones only, so the first task is fine-tuning; its rows are offered when its training
    ends, before any consolidation, which sees them too (CLeWI's released code merges before it stores the newest task).
    """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the current rows alone."""
        return Learner.loss(self, model, batch)

    def adjust_gradients(self, model: nn.Module, batch: Batch) -> None:
        """Takes out of the gradient what points against the memory's."""
        if not len(self.store):
            return
        rows = self.store.sample(self.batch or self.setting.batch, self.setting.generator)
        loss = self.setting.criterion(model(batch.prepare(rows["x"])), rows["y"])
        set_gradient(model, projected(flat_gradient(model), flat_gradient(model, loss)))

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Offers nothing yet."""

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Offers the task's rows to the memory."""
        if self.policy == "herding":
            self.offer_herded(model, task)
        else:
            for rows in portions(task.train, self.setting.generator.device):
                self.store.offer(self.setting.generator, x=rows.x, y=rows.y)


def projected(gradient: Tensor, reference: Tensor) -> Tensor:
    """The vector nearest to `gradient` whose inner product with `reference` is not negative: (P,)."""
    against = (gradient @ reference).clamp(max=0)
    return gradient - against / (reference @ reference).clamp(min=1e-30) * reference

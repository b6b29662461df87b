"""Rules that project the gradient so that a step does not raise the loss on a memory of earlier tasks."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from clkit import checks
from clkit.curvature import trainable
from clkit.data import Batch, Examples, Task
from clkit.learners.rehearsal import MemoryOnly
from clkit.memory import StepPolicy

EPSILON = 1e-3  # times its mean, added to the diagonal of the Gram matrix (the authors' code adds 1e-3 itself)


@dataclass
class AGEM(MemoryOnly):
    """Fine-tuning whose gradient is projected where it would raise the loss on a batch of earlier tasks' examples.

    A-GEM, Chaudhry et al. 2019 (arXiv 1812.00420), equation 11: g <- g - min(0, g.r / r.r) r, so that g.r >= 0. Here g
    is the gradient of the current batch and r that of a batch from the memory. Nothing is replayed. While a task is
    learned the memory holds earlier ones only, so the first task is fine-tuning. Which of a task's rows are
    offered, and when, is `fill`:

    - "task": all of them when its training ends, before any consolidation, which sees them too
    - "batch", Mammoth's and CLeWI's code: one random batch of them (of the training's size), after a consolidation,
      which sees earlier tasks alone. The newest classes are then lost by merging.
    """

    once: bool = field(default=True, init=False, repr=False)
    fill: Literal["task", "batch"] = "task"

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
        """Offers the task's rows to the memory, if it is filled by tasks."""
        if self.fill == "task":
            self.offer(task, self._herded(model, task) if self.policy == "herding" else None)

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Offers a batch of the task's rows to the memory, if it is filled by batches."""
        if self.fill == "batch":
            generator = self.setting.generator
            order = torch.randperm(len(task.train), generator=generator, device=generator.device)
            self.offer(task, order[: self.setting.batch])


@dataclass
class GEM(AGEM):
    """Fine-tuning whose gradient is projected so that no earlier task's loss on the memory would rise.

    Gradient episodic memory, Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), equations 8 to 11. The gradient is replaced
    by the vector nearest to it whose inner product with the gradient of every earlier task's memory is not negative.
    The dual quadratic programme finds it, with one variable a task; `margin` (gamma) is the least value of each and
    favours earlier tasks. Every step takes a backward pass for each earlier task, over all its stored rows, and waits
    for the device to solve the programme. The paper gives each task an equal part of the memory and keeps its last
    examples: the policy "ring", by task and class. CLeWI's code keeps one batch a task, as of A-GEM.
    """

    policy: StepPolicy = "ring"  # pyright: ignore[reportIncompatibleVariableOverride]
    margin: checks.NotNegative = 0.5

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Sorts the memory by task."""
        super().begin_task(model, task)
        rows = self.store.all()
        tasks = rows["group"] // self.setting.classes if rows else torch.empty(0)
        self.parts = [{name: t[tasks == k] for name, t in rows.items()} for k in tasks.unique().tolist()]

    def adjust_gradients(self, model: nn.Module, batch: Batch) -> None:
        """Replaces the gradient by its projection."""
        if not self.parts:
            return
        gradient = flat_gradient(model)
        losses = (self.setting.criterion(model(batch.prepare(part["x"])), part["y"]) for part in self.parts)
        references = torch.stack([flat_gradient(model, loss) for loss in losses])
        set_gradient(model, projected_on_all(gradient, references, self.margin))

    def stored(self, task: Task, examples: Examples) -> dict[str, Tensor]:
        """What the memory keeps, raw: tensors (n, ...) by name, a group for each task and class among them."""
        first = torch.full((len(examples),), task.index * self.setting.classes, device=examples.y.device)
        group = first + examples.y if examples.y.ndim == 1 else first
        return super().stored(task, examples) | {"group": group}


def flat_gradient(model: nn.Module, loss: Tensor | None = None) -> Tensor:
    """The gradient of a loss, or by default the one that the parameters hold, as one vector: (P,)."""
    wanted = list(trainable(model).values())
    if loss is None:
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in wanted]
    else:
        parts = torch.autograd.grad(loss, wanted, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def set_gradient(model: nn.Module, flat: Tensor) -> None:
    """Gives the parameters the gradient that `flat_gradient` would return as `flat` (P,)."""
    wanted = list(trainable(model).values())
    for p, part in zip(wanted, flat.split([p.numel() for p in wanted]), strict=True):
        p.grad = part.view_as(p)


def projected(gradient: Tensor, reference: Tensor) -> Tensor:
    """The vector nearest to `gradient` (P,) whose inner product with `reference` (P,) is not negative: (P,)."""
    against = (gradient @ reference).clamp(max=0)
    return gradient - against / (reference @ reference).clamp(min=1e-30) * reference


def projected_on_all(gradient: Tensor, references: Tensor, margin: float) -> Tensor:
    """The vector nearest to `gradient` (P,) that goes against no row of `references` (tasks, P); margin 0 is exact."""
    from scipy.linalg import cholesky, solve_triangular
    from scipy.optimize import nnls

    products = (references @ gradient).double().cpu().numpy()
    if (products >= 0).all():
        return gradient
    gram = (references @ references.T).double().cpu().numpy()
    if not (np.isfinite(products).all() and np.isfinite(gram).all()):  # the run reports the loss that led here
        return gradient
    root = cholesky(gram + EPSILON * gram.diagonal().mean() * np.eye(len(gram)), lower=True)
    wanted = solve_triangular(root, products + margin * gram.sum(1), lower=True)
    duals = nnls(root.T, -wanted)[0] + margin
    return gradient + torch.from_numpy(duals).to(references) @ references

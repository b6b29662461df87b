"""Gradient episodic memory."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clkit.data import Batch, Task
from clkit.learners.agem import AGEM, flat_gradient, set_gradient
from clkit.learners.er import portions

EPSILON = 1e-3  # times its mean, added to the diagonal of the Gram matrix (the authors' code adds 1e-3 itself)


@dataclass
class GEM(AGEM):
    """Fine-tuning whose gradient is projected so that no earlier task's loss on the memory would rise.

    GEM, Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), equations 8 to 11: the nearest vector to the gradient whose
    inner product with the gradient of every earlier task's memory is not negative, by the dual quadratic programme, one
    variable a task; `margin` (gamma) is the least value of each and favours earlier tasks. Every step takes a backward
    pass for each earlier task, over all its stored rows, and waits for the device to solve the programme. The paper
    gives each task an equal part of the memory and keeps its last examples: the policy "ring", by task and class.
    """

    policy: str = "ring"
    margin: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.margin >= 0:
            raise ValueError(f"margin: {self.margin!r}; give a number, at least 0")
        if self.policy == "herding":
            raise ValueError("policy: 'herding' is not for GEM, whose memory is sorted by task; use 'ring', its own")

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
        set_gradient(model, projected(gradient, references, self.margin))

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Offers the task's rows to the memory."""
        for rows in portions(task.train, self.setting.generator.device):
            first = torch.full((len(rows),), task.index * self.setting.classes, device=rows.y.device)
            group = first + rows.y if rows.y.ndim == 1 else first
            self.store.offer(self.setting.generator, x=rows.x, y=rows.y, group=group)


def projected(gradient: Tensor, references: Tensor, margin: float) -> Tensor:
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

"""Synaptic intelligence."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clkit.curvature import trainable
from clkit.data import Batch, Task
from clkit.learners.anchored import Anchored, accumulated, values
from clkit.learners.base import Setting, named, under


@dataclass
class SI(Anchored):
    """Synaptic intelligence: pulls parameters to the previous weights by how much each has lowered the loss.

    Zenke et al. 2017 (arXiv 1703.04200): loss + strength sum_i Omega_i (theta_i - theta_previous,i)^2, `strength` the
    paper's c. Over the steps of a task, omega_i = -sum g_i (theta_i after - theta_i before) with g the gradient of
    the loss without the penalty, and Delta_i is the distance gone; then Omega_i += max(omega_i, 0) / (Delta_i^2 + xi).
    The path is made of optimizer steps alone: a consolidation's jumps, in mid-task or at its end, are neither in omega
    nor in Delta. The gradient is that before clipping.
    """

    strength: float = 0.1
    xi: float = 0.1
    factor: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.xi > 0:
            raise ValueError(
                f"xi: {self.xi!r}; give a number above 0, which bounds the importance of what hardly moved"
            )

    def start(self, setting: Setting) -> None:
        """Begins without an anchor and at the start of a path."""
        super().start(setting)
        self.path: dict[str, Tensor] = {}
        self.travelled: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Begins a path."""
        self.path = {name: torch.zeros_like(t) for name, t in values(model).items()}
        self.travelled = {name: torch.zeros_like(t) for name, t in self.path.items()}

    @torch.no_grad()
    def adjust_gradients(self, model: nn.Module, batch: Batch) -> None:
        """Notes where the step starts and the gradient of the loss without the penalty; changes no gradient."""
        self.before = values(model)
        self.slope = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trainable(model).items()
        }
        pull = self.pull(model)
        if pull:
            torch._foreach_sub_([self.slope[n] for n in pull], list(pull.values()))  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Goes on along the path."""
        live, names = trainable(model), list(self.path)
        step = torch._foreach_sub([live[n] for n in names], [self.before[n] for n in names])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_([self.travelled[n] for n in names], step)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(step, [self.slope[n] for n in names])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_sub_([self.path[n] for n in names], step)  # pyright: ignore[reportPrivateImportUsage]

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Takes the anchor and turns the path into importance."""
        super().on_consolidated(model, task)
        new = {name: omega.relu() / (self.travelled[name].square() + self.xi) for name, omega in self.path.items()}
        self.importance = accumulated(self.importance or {}, new)
        self.path, self.travelled = {}, {}

    def state_dict(self) -> dict[str, Tensor]:
        """The generator, the anchor, the importance and, within a task, the path."""
        path = {name: t.clone() for name, t in self.path.items()}
        travelled = {name: t.clone() for name, t in self.travelled.items()}
        return super().state_dict() | named("path", path) | named("travelled", travelled)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self.path = {name: t.clone() for name, t in under("path", state).items()}
        self.travelled = {name: t.clone() for name, t in under("travelled", state).items()}

"""What the rules share that pull parameters to where they were."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clkit.curvature import trainable
from clkit.data import Batch, Examples, Task
from clkit.learners.base import Learner, Setting, named, under


@dataclass
class Anchored(Learner):
    """Pulls every parameter to an anchor, the harder the more important it is; the base of L2, EWC, SI and MAS.

    A step minimises loss + factor strength sum_i importance_i (theta_i - anchor_i)^2, over the parameters that want
    a gradient; there is no anchor in the first task, which is that of fine-tuning bit for bit. The anchor is taken at
    the weights that training goes on from. A parameter that is not in the anchor (it came later) is free, and one of
    the anchor that is now frozen adds nothing. `factor` is the paper's own, so that published strengths mean the same.
    Gradient descent stays stable while lr 2 factor strength importance_i < 2: a loss that grows without bound in the
    second task or later wants less strength or a smaller lr.
    """

    strength: float = 1.0
    factor: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength: {self.strength!r}; give a number, at least 0")

    def start(self, setting: Setting) -> None:
        """Begins without an anchor."""
        super().start(setting)
        self.anchor: dict[str, Tensor] = {}
        self.importance: dict[str, Tensor] | None = {}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the batch, and the penalty from the second task on."""
        loss, term = super().loss(model, batch), self.term(model, batch)
        return loss if term is None else loss + term

    def term(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """What this rule adds to a loss: the penalty; None where there is nothing to pull."""
        return self.penalty(model) if self._names(model)[0] else None

    def penalty(self, model: nn.Module) -> Tensor:
        """factor strength sum_i importance_i (theta_i - anchor_i)^2, a scalar."""
        names, live = self._names(model)
        moved = _flat(live, names) - _flat(self.anchor, names)
        pulled = moved if self.importance is None else moved * _flat(self.importance, names)
        return self.factor * self.strength * (pulled * moved).sum()

    @torch.no_grad()
    def pull(self, model: nn.Module) -> dict[str, Tensor]:
        """The gradient of the penalty by parameter: 2 factor strength importance_i (theta_i - anchor_i)."""
        names, live = self._names(model)
        if not names:
            return {}
        pull = torch._foreach_sub([live[n] for n in names], [self.anchor[n] for n in names])  # pyright: ignore[reportPrivateImportUsage]
        if self.importance is not None:
            torch._foreach_mul_(pull, [self.importance[n] for n in names])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(pull, 2 * self.factor * self.strength)  # pyright: ignore[reportPrivateImportUsage]
        return dict(zip(names, pull, strict=True))

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Takes the anchor."""
        self.anchor = values(model)

    def state_dict(self) -> dict[str, Tensor]:
        """The generator, the anchor and the importance."""
        return super().state_dict() | named("anchor", self.anchor) | named("importance", self.importance or {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self.anchor = under("anchor", state)
        if self.importance is not None:
            self.importance = under("importance", state)

    def _names(self, model: nn.Module) -> tuple[list[str], dict[str, nn.Parameter]]:
        live = trainable(model)
        return [name for name in self.anchor if name in live], live


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that want a gradient, by name."""
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def accumulated(old: Mapping[str, Tensor], new: Mapping[str, Tensor], decay: float = 1.0) -> dict[str, Tensor]:
    """decay old + new, by name; a name that `old` does not have counts as zero."""
    return {name: torch.add(t, old[name], alpha=decay) if name in old else t for name, t in new.items()}


def own_data(task: Task, samples: int | None, generator: torch.Generator) -> Examples:
    """The task's training data, prepared and not augmented: all of it, or `samples` rows drawn with the generator."""
    rows = task.train
    if samples is not None and samples < len(rows):
        draw = torch.randperm(len(rows), generator=generator, device=generator.device)[:samples]
        rows = rows[draw.to(rows.x.device)]
    rows = rows.to(generator.device)
    return Examples(task.prepare(rows.x), rows.y)


def check_samples(samples: int | None) -> None:
    """Raises ValueError unless `samples` is a number of examples or None."""
    if samples is not None and samples < 1:
        raise ValueError(f"samples: {samples!r}; give the number of examples to measure importance on, or None for all")


def _flat(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names])

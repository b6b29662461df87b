"""Elastic weight consolidation, over all tasks and online."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clkit import curvature
from clkit.data import Task
from clkit.learners.anchored import Anchored, accumulated, check_samples, own_data, values
from clkit.learners.base import Setting


@dataclass
class EWC(Anchored):
    """Elastic weight consolidation: pulls parameters to earlier weights by the Fisher information of each task.

    Kirkpatrick et al. 2017 (arXiv 1612.00796): loss + strength / 2 sum_t sum_i F_t,i (theta_i - theta_t,i)^2, one
    quadratic for every earlier task. They add up to one quadratic around the Fisher-weighted mean of the anchors, and
    a constant, so that the state does not grow with the tasks. The paper leaves open how F is computed: here by
    per-example gradients on the task's training data, not augmented, over the label space of the loss; on `samples`
    random examples (None: all), with the `labels` of `curvature.fisher`.
    """

    strength: float = 10.0
    labels: str = "sampled"
    samples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.labels, self.samples)

    def information(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """The diagonal Fisher information of the task's training data at the model's weights."""
        return _information(model, task, self.setting, self.labels, self.samples)

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Adds this task's quadratic to the one there is."""
        earlier, new, here = self.importance or {}, self.information(model, task), values(model)
        total = accumulated(earlier, new)
        self.anchor = self.anchor | {
            name: torch.lerp(self.anchor.get(name, here[name]), here[name], torch.where(f > 0, new[name] / f, 1.0))
            for name, f in total.items()
        }
        self.importance = earlier | total


@dataclass
class OnlineEWC(Anchored):
    """Online elastic weight consolidation: pulls parameters to the previous weights by a running Fisher information.

    Schwarz et al. 2018 (arXiv 1805.06370): loss + strength / 2 sum_i F_i (theta_i - theta_previous,i)^2, where
    F <- gamma F + F_t at the end of task t: `gamma` below 1 lets old tasks fade. F_t is computed as in EWC and, as
    in Mammoth's code, not normalised.
    """

    strength: float = 10.0
    gamma: float = 1.0
    labels: str = "sampled"
    samples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.labels, self.samples)
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma: {self.gamma!r}; give the share of the running Fisher that stays, in [0, 1]")

    def information(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """The diagonal Fisher information of the task's training data at the model's weights."""
        return _information(model, task, self.setting, self.labels, self.samples)

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Takes the anchor and updates the running Fisher information."""
        super().on_consolidated(model, task)
        self.importance = accumulated(self.importance or {}, self.information(model, task), self.gamma)


def _check(labels: str, samples: int | None) -> None:
    if labels not in curvature.LABELS:
        raise ValueError(f"labels: {labels!r} is unknown; choose one of {', '.join(curvature.LABELS)}")
    check_samples(samples)


def _information(model: nn.Module, task: Task, setting: Setting, labels: str, samples: int | None) -> dict[str, Tensor]:
    rows, g = own_data(task, samples, setting.generator), setting.generator
    space = setting.criterion.space(rows.y)
    return curvature.fisher(model, rows.x, labels=labels, y=rows.y, space=space, generator=g)

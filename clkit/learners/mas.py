"""Memory aware synapses."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from clkit import curvature
from clkit.data import Task
from clkit.learners.anchored import Anchored, accumulated, check_samples, own_data


@dataclass
class MAS(Anchored):
    """Memory aware synapses: pulls parameters to the previous weights by how much the outputs react to each.

    Aljundi et al. 2018 (arXiv 1711.09601): loss + strength sum_i Omega_i (theta_i - theta_previous,i)^2; Omega sums up,
    over the tasks, the mean of |d ||f(x)||^2 / d theta_i| over a task's training data, not augmented: `samples` random
    examples, None for all. The paper leaves open which outputs count: here all of the network's.
    """

    strength: float = 0.1
    samples: int | None = None
    factor: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self.samples)

    def sensitivity(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """The importance of each parameter on the task's training data at the model's weights."""
        return curvature.sensitivity(model, own_data(task, self.samples, self.setting.generator).x)

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Takes the anchor and adds this task's importance."""
        super().on_consolidated(model, task)
        self.importance = accumulated(self.importance or {}, self.sensitivity(model, task))

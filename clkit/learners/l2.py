"""L2 regularisation towards the previous weights, in the loss and outside it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clkit.curvature import trainable
from clkit.data import Batch
from clkit.learners.anchored import Anchored
from clkit.learners.base import Setting


@dataclass
class L2(Anchored):
    """Pulls all parameters alike to the weights at the end of the previous task.

    The baseline of Kirkpatrick et al. 2017 (arXiv 1612.00796): loss + strength / 2 ||theta - theta_previous||^2.
    """

    strength: float = 0.1

    def start(self, setting: Setting) -> None:
        """Begins without an anchor; every parameter is as important as any other."""
        super().start(setting)
        self.importance = None


@dataclass
class DecoupledL2(L2):
    """L2 outside the optimizer: a decay towards the previous weights, as AdamW's weight decay is one towards zero.

    theta <- theta - lr u - lr strength (theta - theta_previous), where u is the optimizer's direction from the task's
    gradients alone and lr the step's learning rate; the loss has no penalty. With plain gradient descent it is L2. With
    momentum or Adam it is not (Loshchilov & Hutter 2019, arXiv 1711.05101, on decay and penalty), and it is still SFA
    (Kleiman et al. 2025, arXiv 2501.05559) with a merge after every step: with beta = lr strength and a learning rate
    of lr / (1 - beta). It stays stable while lr strength < 2. As the decay comes after the step, `Training.clip` does
    not see it.
    """

    def term(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Nothing: the loss is that of the task."""
        return None

    def adjust_gradients(self, model: nn.Module, batch: Batch) -> None:
        """Notes the pull at the weights that the gradients are of; changes no gradient."""
        self.noted = self.pull(model)

    @torch.no_grad()
    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Adds the decay to the optimizer's step."""
        live = trainable(model)
        if self.noted:
            torch._foreach_add_([live[n] for n in self.noted], list(self.noted.values()), alpha=-batch.lr)  # pyright: ignore[reportPrivateImportUsage]

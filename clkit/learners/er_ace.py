"""Experience replay with an asymmetric cross entropy."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clkit.data import Batch
from clkit.learners.er import ER


@dataclass
class ERACE(ER):
    """Experience replay whose current rows compete among the classes of their own batch only.

    ER-ACE, Caccia et al. 2022 (arXiv 2104.05025), equation 3: L(current; classes of the batch) + L(replayed; all
    classes). New classes then no longer push the old ones' logits down at the start of a task. The paper gives replayed
    rows the classes seen so far; here they get the label space of `Training(labels=...)`, of which "seen" is that. One
    forward pass serves both, so BatchNorm sees them together, where released code makes two passes.
    """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy of the current rows among their batch's classes, plus that of the replayed rows."""
        joined = self.replayed(batch)
        logits = model(joined.x)
        present = (batch.y.flatten() == torch.arange(logits.shape[-1], device=logits.device)[:, None]).any(1)
        current = self.setting.criterion(logits[: batch.size], batch.y, among=present)
        if len(joined.y) == batch.size:
            return current
        return current + self.setting.criterion(logits[batch.size :], joined.y[batch.size :])

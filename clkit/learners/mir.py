"""Maximally interfered retrieval."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clkit.curvature import trainable
from clkit.data import Batch
from clkit.evaluation import outputs, side_pass
from clkit.learners.base import Setting
from clkit.learners.er import ER


@dataclass
class MIR(ER):
    """Experience replay of those stored examples whose loss would rise most by the step on the current rows.

    Aljundi et al. 2019 (arXiv 1908.04742), equation 1: among `candidates` drawn from the memory (None: twice as many as
    are replayed, as in CLeWI's runs), the `batch` with the largest loss(theta - lr gradient) - loss(theta) are
    replayed, theta - lr gradient being a virtual step of plain gradient descent on the current rows alone, at the
    step's learning rate. The losses are taken in evaluation mode, so that a candidate's does not depend on the others;
    the pass for the virtual step leaves BatchNorm's statistics as they were. (In CLeWI's released code gradients are
    cleared before they are read: all scores tie, and MIR is ER.)
    """

    candidates: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates is not None and self.candidates < (self.batch or 1):
            raise ValueError(f"candidates: {self.candidates!r}; give at least as many as are replayed a step")

    def start(self, setting: Setting) -> None:
        """Begins with an empty memory."""
        super().start(setting)
        if self.candidates is not None and self.batch is None and self.candidates < setting.batch:
            raise ValueError(
                f"candidates: {self.candidates!r}, and {setting.batch} are replayed a step; give at least as many, "
                "or a smaller batch"
            )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy over the current rows and the most interfered of the candidates."""
        joined = self.interfered(model, batch)
        return self.setting.criterion(model(joined.x), joined.y)

    def interfered(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with the most interfered candidates joined to it; all of them if they are not more."""
        count = self.batch or self.setting.batch
        drawn = 2 * count if self.candidates is None else self.candidates
        rows = self.store.sample(drawn, self.setting.generator) if len(self.store) else {}
        if not rows:
            return batch
        if len(rows["y"]) > count:
            worst = self.rises(model, batch, batch.prepare(rows["x"]), rows["y"]).topk(count).indices
            rows = {name: tensor[worst] for name, tensor in rows.items()}
        return batch.join(rows["x"], rows["y"])

    def rises(self, model: nn.Module, batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        """By how much the virtual step on the batch raises the loss of each example: (N,)."""
        parameters = trainable(model)
        loss = self.setting.criterion(side_pass(model, batch.x), batch.y)
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        with torch.no_grad():
            stepped = {n: p - batch.lr * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
            before, after = (self.setting.criterion(outputs(model, w, x), y, "none") for w in (parameters, stepped))
        return (after - before).view(len(y), -1).mean(1)

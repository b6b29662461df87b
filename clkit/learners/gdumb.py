"""GDumb: learning nothing until the end, then the memory alone."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clkit.data import Batch, Task
from clkit.learners.base import Setting, named, under
from clkit.learners.er import ER
from clkit.weights import get_weights, set_weights

MOMENTUM, WEIGHT_DECAY, CLIP = 0.9, 1e-6, 10.0


@dataclass
class GDumb(ER):
    """Greedily balances a memory, trains nothing on the stream, and fits a fresh network to the memory after each task.

    Prabhu et al. 2020 (ECCV, "GDumb: a simple approach that questions our progress in continual learning"). The steps
    of the stream only offer rows to the memory; their loss is zero. After a task the network goes back to the weights
    that it had before the first one and is trained for `fit_epochs` on the memory by SGD (momentum 0.9, weight decay
    1e-6, gradients clipped to norm 10) in batches of `batch` (None: the stream's), its learning rate falling from
    `max_lr` to `min_lr` by a cosine that starts afresh in epochs 1, 2, 4, 8, ... (SGDR, Loshchilov and Hutter 2017),
    as in the released code, after a first epoch at a tenth of `max_lr`; 2^k epochs end with a whole cycle. With
    probability `cutmix` a batch of images has a box of each image replaced by another image's (CutMix, Yun et al. 2019,
    arXiv 1905.04899, one box a batch, its area uniform in [0, 1] but for the border), its loss shared out by area. The
    paper fits once, for the last task; here after each, so that there is an accuracy for each.
    """

    policy: str = field(default="balanced", init=False, repr=False)
    fit_epochs: int = 256
    max_lr: float = 0.05
    min_lr: float = 5e-4
    cutmix: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fit_epochs, int) or self.fit_epochs < 1:
            raise ValueError(f"fit_epochs: {self.fit_epochs!r}; give a whole number of passes over the memory, from 1")
        if not 0 < self.min_lr <= self.max_lr:
            raise ValueError(f"min_lr: {self.min_lr!r} with max_lr={self.max_lr!r}; give 0 < min_lr <= max_lr")
        if not 0 <= self.cutmix <= 1:
            raise ValueError(f"cutmix: {self.cutmix!r}; give a probability in [0, 1], 0 for none")

    def start(self, setting: Setting) -> None:
        """Begins with an empty memory and no weights to go back to."""
        super().start(setting)
        self.initial: dict[str, Tensor] = {}
        self.augments = False

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Keeps the weights that the first task begins with."""
        super().begin_task(model, task)
        if not self.initial:
            self.initial = get_weights(model)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Zero, whatever the weights: no forward pass, so that statistics stay too."""
        self.augments = batch.generator is not None
        return torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum() * 0

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Fits the memory from the initial weights."""
        set_weights(model, self.initial)
        if len(self.store):
            self.fit(model, task)

    def fit(self, model: nn.Module, task: Task) -> None:
        """Trains the model on the memory but for what is held out of it."""
        rows, generator, criterion = self.store.all(), self.setting.generator, self.setting.criterion
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        for epoch in range(self.fit_epochs):
            optimizer.param_groups[0]["lr"] = self.rate(epoch)
            order = torch.randperm(len(rows["y"]), generator=generator, device=generator.device)
            parts = order.split(self.batch or self.setting.batch)
            alone = len(parts) > 1 and len(parts[-1]) == 1  # one row has no batch statistics
            for part in parts[:-1] if alone else parts:
                x, y = task.prepare(rows["x"][part], generator if self.augments else None), rows["y"][part]
                if self.cutmix and x.ndim == 4:
                    x, other, share = cutmix(x, self.cutmix, generator)
                    logits = model(x)
                    loss = share * criterion(logits, y) + (1 - share) * criterion(logits, y[other])
                else:
                    loss = criterion(model(x), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch of the fit."""
        if epoch == 0:
            return 0.1 * self.max_lr
        length = 2 ** (epoch.bit_length() - 1)
        share = (epoch - length) / length
        return self.min_lr + (self.max_lr - self.min_lr) * (1 + math.cos(math.pi * share)) / 2

    def state_dict(self) -> dict[str, Tensor]:
        """The generator, the memory and the initial weights."""
        return super().state_dict() | named("initial", self.initial)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self.initial = under("initial", state)


def cutmix(x: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces one box of all images by that of others, with some probability: mixed images, the others, own share.

    Images are (N, C, H, W); `others` (N,) says whose box each has got, `share` which part of the area is still its own.
    """
    height, width = x.shape[2:]
    other = torch.randperm(len(x), generator=generator, device=x.device)
    draw, own, down, right = torch.rand(4, generator=generator, device=x.device)
    half = (1 - own).sqrt() / 2

    def between(size: int, centre: Tensor) -> Tensor:
        return ((torch.arange(size, device=x.device) + 0.5) / size - centre).abs() < half

    box = between(height, down)[:, None] & between(width, right) & (draw < probability)
    return torch.where(box, x[other], x), other, 1 - box.float().mean()

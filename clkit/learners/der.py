"""Dark experience replay: stored logits as targets."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from clkit import weights
from clkit.data import Batch, Task
from clkit.evaluation import EVALUATION_BATCH
from clkit.learners.er import ER
from clkit.weights import evaluation_mode


@dataclass
class DERpp(ER):
    """Replays the logits that stored examples had when they were stored, and the labels of others.

    DER++, Buzzega et al. 2020 (arXiv 2004.07211), equation 6: L(current) + alpha |h(x') - z'|^2 + beta L(x'', y''),
    with two draws from the memory, x' and x''; the square is a mean over classes, as in the authors' code. A term whose
    weight is 0 draws nothing, so with both at 0 this is fine-tuning. One forward pass serves all three, so BatchNorm
    sees them together. Rows are offered in every epoch, as the paper samples along the path of training, each time with
    the logits that the training pass gave; the memory may hold a row twice. When a consolidation changes the weights
    the logits are those of a network that is no more; `refresh` then takes them from the new weights, in
    evaluation mode (with released code that made DER collapse).
    """

    alpha: float = 0.1
    beta: float = 0.5
    refresh: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)!r}; give the weight of a loss term, at least 0")
        if self.policy == "herding":
            raise ValueError("policy: 'herding' stores rows when a task ends, logits as training goes; use another")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy, plus the distance to stored logits, plus cross entropy of replayed rows."""
        weighed = [weight for weight in (self.alpha, self.beta) if weight and len(self.store)]
        count = self.batch or self.setting.batch
        draws = [self.store.sample(count, self.setting.generator) for _ in weighed]
        logits = model(torch.cat([batch.x, *(batch.prepare(rows["x"]) for rows in draws)]))
        current, *replayed = logits.split([batch.size, *(len(rows["y"]) for rows in draws)])
        self.current = current.detach().float()
        loss = self.setting.criterion(current, batch.y)
        if self.alpha and draws:
            loss = loss + self.alpha * mse_loss(replayed[0], draws[0]["logits"])
        if self.beta and draws:
            loss = loss + self.beta * self.setting.criterion(replayed[-1], draws[-1]["y"])
        return loss

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Offers the current rows with their logits to the memory."""
        self.store.offer(self.setting.generator, x=batch.raw, y=batch.y, logits=self.current)

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Notes the weights, to see whether a consolidation changes them."""
        if self.refresh:
            self.trained = weights.get_weights(model)

    @torch.no_grad()
    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """With `refresh`, takes the stored logits anew if the weights are not those just trained."""
        if self.refresh and not weights.equal(self.trained or {}, weights.live_tensors(model)):
            rows = {name: tensor[: len(self.store)] for name, tensor in self.store.rows.items()}
            with evaluation_mode(model):
                fresh = [model(task.prepare(x)) for x in rows["x"].split(EVALUATION_BATCH)]
            rows["logits"].copy_(torch.cat(fresh))
        self.trained = None


@dataclass
class DER(DERpp):
    """Replays the logits that stored examples had when they were stored.

    DER, Buzzega et al. 2020 (arXiv 2004.07211), equation 5: L(current) + alpha |h(x') - z'|^2; DER++ without labels.
    """

    beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta:
            raise ValueError(f"beta: {self.beta!r}; DER replays no labels, so leave it at 0 or use DERpp")

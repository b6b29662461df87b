"""A memory beside fine-tuning."""

from dataclasses import dataclass

from torch import Tensor, nn

from clkit.data import Batch
from clkit.learners.base import Learner
from clkit.learners.er import ER


@dataclass
class MemoryOnly(ER):
    """Fine-tuning that fills a memory and replays nothing of it: consolidations see examples, training does not.

    "No rehearsal" in CLeWI's experiments (arXiv 2404.04002); first of a `Sum`, it lends its memory to rules that keep
    none, as in `Sum(MemoryOnly(50), EWC())`.
    """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the current rows alone."""
        return Learner.loss(self, model, batch)

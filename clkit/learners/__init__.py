"""Learning rules, one file each: what a step minimises and what is remembered."""

from clkit.learners.base import Criterion, Learner, Setting
from clkit.learners.er import ER

LEARNERS: dict[str, type[Learner]] = {"fine-tuning": Learner, "ER": ER}

__all__ = ["ER", "LEARNERS", "Criterion", "Learner", "Setting"]

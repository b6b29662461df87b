"""Continual learning in weight space: interpolate, average, align, merge and modulate the weights of networks."""

from clkit import alignment, curvature, data, learners, merging, metrics, models, normalization, weights
from clkit.consolidation import CLeWI, Merged, NoConsolidation, Progress
from clkit.learners import ER, Learner
from clkit.training import Evaluation, Result, Training, evaluate, run

__all__ = [
    "ER",
    "CLeWI",
    "Evaluation",
    "Learner",
    "Merged",
    "NoConsolidation",
    "Progress",
    "Result",
    "Training",
    "alignment",
    "curvature",
    "data",
    "evaluate",
    "learners",
    "merging",
    "metrics",
    "models",
    "normalization",
    "run",
    "weights",
]

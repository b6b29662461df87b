"""Continual learning in weight space: interpolate, average, align, merge and modulate the weights of networks."""

from clkit import (
    alignment, curvature, data, evaluation, learners, merging, metrics, models, modulation, normalization,
    symmetry, tangent, weights,
)  # fmt: skip
from clkit.consolidation import HCMM, SFA, CLeWI, Merged, Merging, NoConsolidation, Progress, WiSEFT
from clkit.learners import ER, Learner, PerTask
from clkit.modulation import Modulated, Modulation
from clkit.training import Evaluation, Result, Training, evaluate, run

"""Alignment: the permutation symmetry of any model, derived; matching networks by activations or weights."""

from clkit.alignment.matching import STATISTICS, Alignment, align, assign, similarities
from clkit.alignment.permutation import (
    Permutations,
    compose,
    identity,
    invert,
    permute,
    random_permutations,
)
from clkit.alignment.symmetry import Axis, Group, Symmetry, symmetry

__all__ = [
    "STATISTICS",
    "Alignment",
    "Axis",
    "Group",
    "Permutations",
    "Symmetry",
    "align",
    "assign",
    "compose",
    "identity",
    "invert",
    "permute",
    "random_permutations",
    "similarities",
    "symmetry",
]

"""Alignment: matching networks by activations or weights over a symmetry, and the elements that permute them.

`symmetry` derives the symmetry of a model; it and its elements live in `clkit.symmetry`.
"""

from clkit.alignment.assignment import assign
from clkit.alignment.matching import Alignment, align, align_many
from clkit.alignment.similarity import STATISTICS, Similarities, Statistic, similarities
from clkit.symmetry import (
    Axis, Group, Permutations, Proof, Row, Symmetry, Table,
    compose, identity, invert, permute, random_permutations, symmetry,
)  # fmt: skip

"""Alignment: the permutation symmetry of any model, derived; matching networks by activations or weights."""

from clkit.alignment.activations import STATISTICS, Similarities, similarities
from clkit.alignment.matching import Alignment, align, assign
from clkit.symmetry import (
    Axis, Group, Permutations, Proof, Row, Symmetry, Table,
    compose, identity, invert, permute, random_permutations, symmetry,
)  # fmt: skip

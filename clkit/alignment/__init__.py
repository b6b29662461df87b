"""Alignment: the permutation symmetry of any model, derived; matching networks by activations or weights."""

from clkit.alignment.activations import STATISTICS, Similarities, similarities
from clkit.alignment.derivation import symmetry
from clkit.alignment.matching import Alignment, align, assign
from clkit.alignment.permutation import (
    Permutations, compose, identity, invert, permute, random_permutations,
)  # fmt: skip
from clkit.alignment.structure import Axis, Group, Proof, Row, Symmetry, Table

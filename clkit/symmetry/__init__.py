"""The permutation symmetry of any model, derived from its graph, as data."""

from clkit.symmetry.derivation import symmetry
from clkit.symmetry.structure import (
    Axis, Group, Permutations, Proof, Row, Symmetry, Table, compose, identity, invert, permute, random_permutations,
)  # fmt: skip

"""Alignment: matching networks by activations or weights over a symmetry, and the elements that permute them.

`symmetry` derives the symmetry of a model; it and its elements live in `clkit.symmetry`.
"""

from clkit.alignment.matching import (
    STATISTICS, Alignment, Similarities, Statistic,
    align, align_many, assign, similarities,
)  # fmt: skip
from clkit.symmetry import (
    Axis, Group, Permutations, Proof, Row, Symmetry, Table,
    compose, identity, invert, permute, random_permutations, symmetry,
)  # fmt: skip

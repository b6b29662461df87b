"""The permutation symmetry of any model, derived from its graph: colour refinement over index orbits and blocks.

- A *point* is one index on an axis of a tensor: an output channel, a head, a row of a weight. Points that must move as
  one are a *unit*.
- A point has a *colour*, its role. A unit can replace another only if both have one point in each of the same colours.
- A unit may lie in a *block* (a head, a group of a convolution), which is a unit too. Members of a block move with it,
  and freely among themselves. Blocks in blocks are a system of blocks: a forest, in which no unit lies in itself.
- Colours are refined by those of members and blocks until nothing changes. The classes that are left are *orbits*:
  their units may replace each other.

All points of the weights begin free. A walk through the graph (`derivation`) puts *labels* on the axes of every value:
which points lie there. At each operation a rule (`moving`, `rules`) unites points, refines colours and makes blocks,
until the operation commutes with every permutation that is left. It stays so, for whatever comes later only shrinks
the group. The graph (`program`) has core operations, elementwise ones, and attention and pooling in one piece. What
depends on constants only is computed. What an unknown operation meets is pinned, which costs coverage and never
correctness; so are the model's inputs and outputs. Orbits of several units become the groups of a `Symmetry`
(`structure`), which is plain data.
"""

from clkit.symmetry.derivation import symmetry
from clkit.symmetry.elements import Axis, Group, Permutations, compose, invert
from clkit.symmetry.report import Row, Table
from clkit.symmetry.structure import Proof, Symmetry, identity, permute, random_permutations

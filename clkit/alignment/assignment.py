"""Assignment: the permutations that match units best, by given similarities or by inner products of weights."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clkit.symmetry import Permutations, Symmetry
from clkit.symmetry.elements import Element
from clkit.symmetry.points import Ids
from clkit.weights import Weights, dot, equal

ROUNDS = 100
TIE = 1e-9  # of units that look alike, the one that stays is preferred
Matrix = NDArray[np.float64]
Matrices = dict[str, Matrix]


def assign(
    symmetry: Symmetry, matrices: Mapping[str, Matrix], groups: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """The permutations (units,) that maximise the sum of similarities (units, units); units without any stay.

    Blocks are matched by their own similarity plus that of their best matched members. `groups` picks some (default:
    all) of the groups that lie in no block, with their members.
    """
    out: dict[str, Ids] = {}
    for name in symmetry.roots if groups is None else groups:
        out |= {g: np.arange(symmetry.groups[g].units) for g in symmetry.family(name)}
        for member, rows, columns in _matched(symmetry, matrices, name, 0, 0)[1]:
            out[member][rows] = columns
    return {name: torch.from_numpy(out[name]) for name in symmetry.groups if name in out}


def _matched(
    symmetry: Symmetry, matrices: Mapping[str, Matrix], name: str, i: int, j: int
) -> tuple[float, list[tuple[str, Ids, Ids]]]:
    """Matches block i of a group in the reference with block j in the moving network: the gain, and the pairs."""
    from scipy.optimize import linear_sum_assignment

    size, members = symmetry.groups[name].size, symmetry.members[name]
    rows, columns = i * size + np.arange(size), j * size + np.arange(size)
    gain = matrices[name][np.ix_(rows, columns)] if name in matrices else np.zeros((size, size))
    inner = {
        (a, b): [_matched(symmetry, matrices, m, i * size + a, j * size + b) for m in members]
        for a in range(size if members else 0)
        for b in range(size)
    }
    if members:
        gain = gain + [[sum(g for g, _ in inner[a, b]) for b in range(size)] for a in range(size)]
    a, b = linear_sum_assignment(gain + TIE * np.eye(size), maximize=True)
    pairs = [(name, rows, columns[b])]
    for key in zip(a.tolist(), b.tolist(), strict=True):
        pairs += [p for _, found in inner.get(key, []) for p in found]
    return float(gain[a, b].sum()), pairs


def in_turn(
    symmetry: Symmetry,
    permutations: dict[str, Tensor],
    roots: list[str],
    similar: Callable[[str, Permutations], Matrices],
    generator: torch.Generator | None = None,
    pair: "Callable[[Permutations], Pair] | None" = None,
) -> dict[str, Tensor]:
    """Assigns one root's groups after the other, the rest held, until nothing changes; `generator` shuffles rounds.

    With `pair`, a root that one weight holds on two axes takes a step only if that raises its inner product.
    """
    order, tied = roots, {root for root in roots if pair and _meets_itself(symmetry, root)}
    for _ in range(ROUNDS if roots else 0):
        before = permutations
        for root in order:
            new = permutations | assign(symmetry, similar(root, permutations), [root])
            if not pair or root not in tied or pair(new).total(root) > pair(permutations).total(root):
                permutations = new
        if equal(permutations, before):
            break
        if generator:
            order = [roots[k] for k in torch.randperm(len(roots), generator=generator)]
    return permutations


def _meets_itself(symmetry: Symmetry, root: str) -> bool:
    """Does one weight hold a root's groups on two axes?"""
    axes = {(weight, dim) for g in symmetry.family(root) for weight, dim, _ in symmetry.places[g]}
    return len(axes) > len({weight for weight, _ in axes})


class Pair:
    """Inner products of the parameters of two networks, the second permuted."""

    def __init__(
        self, symmetry: Symmetry, reference: Weights, moving: Weights, permutations: Mapping[str, Tensor]
    ) -> None:
        self.symmetry, self.reference, self.moving = symmetry, reference, moving
        self.element = Element.of(symmetry.groups, permutations)

    def cosines(self, name: str, rows: Ids | None = None, columns: Ids | None = None) -> NDArray[np.float64]:
        """Of each two units: their inner product over their lengths, 0 where there is nothing."""
        products, lengths = self.products(name, rows, columns)
        return np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)

    def total(self, root: str) -> float:
        """The inner product of the weights that hold a group or one in it."""
        names = {weight for g in self.symmetry.family(root) for weight, *_ in self.symmetry.places[g]}
        moved = {name: self.element.move(self.symmetry.axes[name], self.moving[name]) for name in names}
        return dot({name: self.reference[name] for name in sorted(names)}, moved)

    def products(
        self, name: str, rows: Ids | None = None, columns: Ids | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Inner products of each two units of a group, or of some, other axes permuted as they stand; and lengths."""
        every = np.arange(self.symmetry.groups[name].units)
        rows, columns = (every if some is None else some for some in (rows, columns))
        products = np.zeros((len(rows), len(columns)))
        squares = np.zeros(len(rows)), np.zeros(len(columns))
        for weight, dim, slots in self.symmetry.places[name]:
            pair = []
            for k, units in enumerate((rows, columns)):
                tensor = (self.reference, self.moving)[k][weight]
                picked = torch.from_numpy(slots[:, units].ravel()).to(tensor.device)
                tensor = tensor.index_select(dim, picked)
                if k:
                    tensor = self.element.move(self.symmetry.axes[weight], tensor, but=dim)
                lanes = tensor.movedim(dim, 0).unflatten(0, (len(slots), len(units)))
                pair.append(lanes.movedim(1, 0).reshape(len(units), -1).double())
                squares[k][:] += pair[k].square().sum(1).cpu().numpy()
            products += (pair[0] @ pair[1].mT).cpu().numpy()
        return products, np.sqrt(np.outer(*squares))

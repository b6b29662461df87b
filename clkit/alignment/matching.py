"""Matching: which unit of one network corresponds to which of another, by their activations or by their weights."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clkit.alignment.activations import STATISTICS, Similarities, similarities
from clkit.symmetry.points import Ids
from clkit.symmetry.structure import Symmetry, check_weights, element, identity, move
from clkit.weights import Weights, check_finite

METHODS = ("activations", "weights")
ROUNDS = 100
HINT = 1e-4  # what weights count beside correlations, where these tie
ALIKE = 1e-5  # correlations that differ less tie: rounding of activations
TIE = 1e-9  # of units that look alike, the one that stays is preferred
Matrices = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Alignment:
    """How to permute the moving weights to look like the reference, and how alike they are then, by group.

    `permutations`; `similarity`, a mean over matched units (of correlations; of cosines if matched by weights; of
    their members for blocks); `identity`, the share of units that stay; `degenerate`, how many units never vary in
    one of the networks, for groups that have such: they were told apart by their weights.
    """

    permutations: dict[str, Tensor]
    similarity: dict[str, float]
    identity: dict[str, float]
    degenerate: dict[str, int]


def align(
    symmetry: Symmetry,
    model: nn.Module,
    reference: Weights,
    moving: Weights,
    inputs: Tensor | None = None,
    *,
    by: str = "activations",
    statistic: str = "pearson",
    batch: int = 32,
    generator: torch.Generator | None = None,
) -> Alignment:
    """Finds the permutations that make `moving` look like `reference`; `permute` then applies them.

    By activations (git re-basin 2209.04836, CLeWI 2404.04002): one pass of both networks over `inputs` in evaluation
    mode; for each group the `similarities` of its units, then one linear assignment that maximises their sum. All
    axes of a residual stream are one group, so shortcuts need no permutations of their own ("junctures"). Blocks
    (heads, groups of a convolution) are matched by how well their members match. The papers leave open what becomes
    of units that never vary (dead ReLUs): here their weights tell them apart.

    By weights (git re-basin, algorithm 1): each group in turn gets the assignment that maximises the inner product of
    all parameters, the others held, until nothing changes; `generator` draws the order of the later rounds.

    `model` is any model of the architecture; it is left as it is. Raises ValueError for an unknown choice, weights
    that do not fit the symmetry or are not finite, or no inputs.
    """
    for name, value, known in (("by", by, METHODS), ("statistic", statistic, STATISTICS)):
        if value not in known:
            close = difflib.get_close_matches(str(value), known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{name}: {value!r} is unknown; choose one of {', '.join(known)}{hint}")
    for name, weights in (("reference", reference), ("moving", moving)):
        check_weights(symmetry, weights, name)
        check_finite(weights, name)
    if by == "weights":
        permutations = match_weights(symmetry, reference, moving, generator)
        pair = _Pair(symmetry, reference, moving, permutations)
        return _result(symmetry, permutations, {g: pair.cosines(g) for g in symmetry.groups}, {})
    if inputs is None or not len(inputs):
        raise ValueError("inputs: matching by activations needs examples, got none; pass some or use by='weights'")
    if batch < 1:
        raise ValueError(f"batch: {batch!r} is not a whole number from 1 on")
    found = similarities(symmetry, model, reference, moving, inputs, statistic=statistic, batch=batch)
    permutations = _match_activations(symmetry, found, reference, moving)
    vague = {g: int((a | b).sum()) for g, (a, b) in found.constant.items()}
    return _result(symmetry, permutations, found.matrix, {g: n for g, n in vague.items() if n})


def assign(symmetry: Symmetry, matrices: Matrices, groups: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The permutations that maximise the sum of the similarities of matched units; units without any stay.

    Blocks are matched by their own similarity plus that of their best matched members. `groups` picks some (default:
    all) of the groups that lie in no block, with their members.
    """
    out: dict[str, Ids] = {}
    for name in symmetry.roots if groups is None else groups:
        out |= {g: np.arange(symmetry.groups[g].units) for g in symmetry.family(name)}
        for member, rows, columns in _assign(symmetry, matrices, name, 0, 0)[1]:
            out[member][rows] = columns
    return {name: torch.from_numpy(out[name]) for name in symmetry.groups if name in out}


def _assign(
    symmetry: Symmetry, matrices: Matrices, name: str, i: int, j: int
) -> tuple[float, list[tuple[str, Ids, Ids]]]:
    """Matches block i of a group in the reference with block j in the moving network: the gain, and the pairs."""
    from scipy.optimize import linear_sum_assignment

    size, members = symmetry.groups[name].size, symmetry.members[name]
    rows, columns = i * size + np.arange(size), j * size + np.arange(size)
    gain = matrices[name][np.ix_(rows, columns)] if name in matrices else np.zeros((size, size))
    inner = {
        (a, b): [_assign(symmetry, matrices, m, i * size + a, j * size + b) for m in members]
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


def _match_activations(
    symmetry: Symmetry, found: Similarities, reference: Weights, moving: Weights
) -> dict[str, Tensor]:
    """`assign`, with the weights to tell apart units that look alike at work, never vary or are not seen."""
    blind = {g: np.zeros((group.units,) * 2) for g, group in symmetry.groups.items() if not symmetry.members[g]}
    found = Similarities(blind | found.matrix, found.constant)
    permutations = assign(symmetry, found.matrix)
    vague = {g: (_ties(m), _ties(m.T)) for g, m in found.matrix.items()}
    vague = {g: ties for g, ties in vague.items() if min(map(len, ties)) > 1}
    roots = dict.fromkeys(symmetry.root(g) for g in vague)
    for _ in range(ROUNDS if vague else 0):
        before = dict(permutations)
        for root in roots:
            matrices, pair = dict(found.matrix), _Pair(symmetry, reference, moving, permutations)
            for g in (g for g in symmetry.family(root) if g in vague):
                matrices[g] = matrices[g].copy()
                matrices[g][np.ix_(*vague[g])] += HINT * pair.cosines(g, *vague[g])
            permutations |= assign(symmetry, matrices, [root])
        if all(torch.equal(before[g], p) for g, p in permutations.items()):
            break
    return permutations


def _ties(matrix: NDArray[np.float64]) -> Ids:
    """The rows whose largest entry is not the largest by more than `ALIKE`."""
    if matrix.shape[1] < 2:
        return np.arange(len(matrix))
    best = np.partition(matrix, -2, axis=1)[:, -2:]
    return np.flatnonzero(best[:, 1] - best[:, 0] <= ALIKE)


def match_weights(
    symmetry: Symmetry, reference: Weights, moving: Weights, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Matches by the inner products of parameters, one group after the other until nothing changes.

    The first round goes from the input to the output, later ones in an order that `generator` draws. Weights of
    grouped convolutions do not take part, for what they say about one axis depends on the other; running statistics
    are no parameters.
    """
    generator = generator or torch.Generator().manual_seed(0)
    permutations = identity(symmetry)
    order = torch.arange(len(symmetry.roots))
    for _ in range(ROUNDS):
        before = dict(permutations)
        for root in (symmetry.roots[k] for k in order):
            pair = _Pair(symmetry, reference, moving, permutations)
            permutations |= assign(symmetry, {g: pair.products(g) for g in symmetry.family(root)}, [root])
        if all(torch.equal(before[g], p) for g, p in permutations.items()):
            break
        order = torch.randperm(len(order), generator=generator)
    return permutations


class _Pair:
    """Inner products of the parameters of two networks, the second permuted."""

    def __init__(
        self, symmetry: Symmetry, reference: Weights, moving: Weights, permutations: Mapping[str, Tensor]
    ) -> None:
        self.symmetry, self.reference, self.moving = symmetry, reference, moving
        self.element = element(symmetry, permutations)

    def products(self, name: str, rows: Ids | None = None, columns: Ids | None = None) -> NDArray[np.float64]:
        """Of each two units of a group (or some of them), with all other axes permuted as they stand."""
        return self._compare(name, rows, columns)[0]

    def cosines(self, name: str, rows: Ids | None = None, columns: Ids | None = None) -> NDArray[np.float64]:
        """`products` over the lengths, 0 where there is nothing."""
        products, lengths = self._compare(name, rows, columns)
        return np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)

    def _compare(
        self, name: str, rows: Ids | None, columns: Ids | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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
                    tensor = move(self.symmetry, self.element, weight, tensor, but=dim)
                lanes = tensor.movedim(dim, 0).unflatten(0, (len(slots), len(units)))
                pair.append(lanes.movedim(1, 0).reshape(len(units), -1).double())
                squares[k][:] += pair[k].square().sum(1).cpu().numpy()
            products += (pair[0] @ pair[1].mT).cpu().numpy()
        return products, np.sqrt(np.outer(*squares))


def _result(
    symmetry: Symmetry, permutations: dict[str, Tensor], matrices: Matrices, degenerate: dict[str, int]
) -> Alignment:
    similarity: dict[str, float] = {}
    for g in reversed(symmetry.groups):
        if g in matrices and matrices[g].any():
            similarity[g] = float(matrices[g][np.arange(len(permutations[g])), permutations[g].numpy()].mean())
        elif inside := [similarity[m] for m in symmetry.members[g] if m in similarity]:
            similarity[g] = sum(inside) / len(inside)
    return Alignment(
        permutations,
        {g: similarity[g] for g in symmetry.groups if g in similarity},
        {g: float((p == torch.arange(len(p))).double().mean()) for g, p in permutations.items()},
        degenerate,
    )

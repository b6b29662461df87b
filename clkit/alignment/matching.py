"""Matching: which unit of one network corresponds to which of another, by their activations or by their weights."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clkit.alignment.activations import STATISTICS, similarities
from clkit.alignment.permutation import check_weights, identity, permute_tensor
from clkit.alignment.points import Ids
from clkit.alignment.symmetry import Symmetry
from clkit.weights import Weights, check_finite

METHODS = ("activations", "weights")
ROUNDS = 100
HINT = 1e-6  # of the weights' similarity, where activations say nothing
TIE = 1e-9  # of units that look alike, the one that stays is preferred
Similarity = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Alignment:
    """How to permute the moving weights to look like the reference, and how alike they are then.

    By group: `permutations`; `similarity`, the mean over matched units (of correlations, or cosines when matched by
    weights); `identity`, the share of units that stay; `degenerate`, for groups with units that are constant in one
    of the networks, their number (matched arbitrarily); it is empty if all is well.
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
    batch: int = 128,
    generator: torch.Generator | None = None,
) -> Alignment:
    """Finds the permutations that make `moving` look like `reference`: `permute(symmetry, result.permutations, moving)`.

    By activations (git re-basin 2209.04836, CLeWI 2404.04002): one pass of both networks over `inputs` in evaluation
    mode; for each group the correlations between its units in the two networks, over all examples and positions, then
    one linear assignment that maximises their sum. Where a residual stream is read many times the correlations are
    averaged. Blocks (heads, groups of a convolution) are matched by how well their members match. Units without
    variance (dead ReLUs), of which correlations say nothing, are told apart by their weights. CLeWI's released code
    normalises by images where there are positions; `statistic="clewi2024"` does so too.

    By weights (git re-basin, algorithm 1): each group in turn gets the assignment that maximises the inner product of
    all parameters, the others held, until nothing changes; `generator` draws the order of the later rounds.

    Raises ValueError for an unknown choice, weights that do not fit the symmetry or are not finite, or no inputs.
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
        return match_weights(symmetry, reference, moving, generator)
    if inputs is None or not len(inputs):
        raise ValueError("inputs: matching by activations needs examples, got none; pass some or use by='weights'")
    if batch < 1:
        raise ValueError(f"batch: {batch!r} is not a whole number from 1 on")
    found, constant = similarities(symmetry, model, reference, moving, inputs, statistic=statistic, batch=batch)
    permutations = assign(symmetry, found)
    vague = [g for g, n in constant.items() if n]
    for _ in range(ROUNDS if vague else 0):
        nudged = {g: s + HINT * _cosines(symmetry, g, permutations, reference, moving) if g in vague else s
                  for g, s in found.items()}
        before, permutations = permutations, assign(symmetry, nudged)
        if all(torch.equal(before[g], p) for g, p in permutations.items()):
            break
    return _result(symmetry, permutations, found, constant)


def _result(
    symmetry: Symmetry, permutations: dict[str, Tensor], found: Similarity, constant: Mapping[str, int]
) -> Alignment:
    return Alignment(
        permutations,
        {g: float(found[g][np.arange(len(p)), p.numpy()].mean()) for g, p in permutations.items() if g in found},
        {g: float((p == torch.arange(len(p))).double().mean()) for g, p in permutations.items()},
        {g: n for g, n in constant.items() if n},
    )


def assign(symmetry: Symmetry, found: Similarity) -> dict[str, Tensor]:
    """The permutations that maximise the sum of the similarities of matched units; units without any stay.

    Blocks are matched by their own similarity plus that of their best matched members.
    """
    out = {name: np.arange(group.units) for name, group in symmetry.groups.items()}
    for name, group in symmetry.groups.items():
        if group.within is None:
            for member, rows, columns in _assign(symmetry, found, name, 0, 0)[1]:
                out[member][rows] = columns
    return {name: torch.from_numpy(p) for name, p in out.items()}


def _assign(
    symmetry: Symmetry, found: Similarity, name: str, i: int, j: int
) -> tuple[float, list[tuple[str, Ids, Ids]]]:
    """Matches block i of a group in the reference with block j in the moving network: the gain, and the pairs."""
    from scipy.optimize import linear_sum_assignment

    size = symmetry.groups[name].size
    rows, columns = i * size + np.arange(size), j * size + np.arange(size)
    gain = found[name][np.ix_(rows, columns)] if name in found else np.zeros((size, size))
    members = [g for g, group in symmetry.groups.items() if group.within == name]
    inner = {}
    if members:
        inner = {(a, b): [_assign(symmetry, found, m, int(rows[a]), int(columns[b])) for m in members]
                 for a in range(size) for b in range(size)}
        gain = gain + [[sum(g for g, _ in inner[a, b]) for b in range(size)] for a in range(size)]
    a, b = linear_sum_assignment(gain + TIE * np.eye(size), maximize=True)
    pairs = [(name, rows, columns[b])]
    for key in zip(a.tolist(), b.tolist(), strict=True):
        pairs += [p for _, ps in inner.get(key, []) for p in ps]
    return float(gain[a, b].sum()), pairs


def match_weights(
    symmetry: Symmetry, reference: Weights, moving: Weights, generator: torch.Generator | None = None
) -> Alignment:
    """Matches by the inner products of parameters, one group after the other until nothing changes.

    The first round goes from the input to the output, later ones in an order that `generator` draws. Weights of
    grouped convolutions do not take part, for what they say about one axis depends on the other; running statistics
    are no parameters.
    """
    generator = generator or torch.Generator().manual_seed(0)
    permutations = identity(symmetry)
    roots = [name for name, group in symmetry.groups.items() if group.within is None]
    families = {root: [g for g in symmetry.groups if _root(symmetry, g) == root] for root in roots}
    order = torch.arange(len(roots))
    for _ in range(ROUNDS):
        changed = False
        for root in (roots[k] for k in order):
            found = {g: _products(symmetry, g, permutations, reference, moving) for g in families[root]}
            new = assign(symmetry, found)
            changed |= any(not torch.equal(new[g], permutations[g]) for g in families[root])
            permutations |= {g: new[g] for g in families[root]}
        if not changed:
            break
        order = torch.randperm(len(roots), generator=generator)
    cosines = {g: _cosines(symmetry, g, permutations, reference, moving) for g in symmetry.groups}
    return _result(symmetry, permutations, cosines, {})


def _root(symmetry: Symmetry, name: str) -> str:
    while outer := symmetry.groups[name].within:
        name = outer
    return name


def _products(
    symmetry: Symmetry, name: str, permutations: Mapping[str, Tensor], reference: Weights, moving: Weights
) -> NDArray[np.float64]:
    """Inner products of the parameters of each two units of a group, all other axes permuted as they stand."""
    group = symmetry.groups[name]
    total = np.zeros((group.units, group.units))
    for weight, dim, slots in symmetry.places(name):
        moved = permute_tensor(symmetry, permutations, weight, moving[weight], keep=dim)
        rows = (t.movedim(dim, 0).reshape(t.shape[dim], -1)[slots] for t in (reference[weight], moved))
        a, b = (t.double().movedim(1, 0).flatten(1) for t in rows)
        total += (a @ b.mT).cpu().numpy()
    return total


def _cosines(
    symmetry: Symmetry, name: str, permutations: Mapping[str, Tensor], reference: Weights, moving: Weights
) -> NDArray[np.float64]:
    """`_products` over the lengths, 0 where there is nothing."""
    stay = identity(symmetry)
    lengths = [_products(symmetry, name, stay, w, w).diagonal() ** 0.5 for w in (reference, moving)]
    products, scale = _products(symmetry, name, permutations, reference, moving), np.outer(*lengths)
    return np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)

"""Matching: which unit of one network corresponds to which of another, by their activations or by their weights."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clkit import checks
from clkit.checks import Count
from clkit.modules import frozen_tensors
from clkit.symmetry.elements import Element, Permutations
from clkit.symmetry.points import Ids
from clkit.symmetry.structure import Symmetry, Tap, check_weights, identity
from clkit.weights import Weights, check_finite

Statistic = Literal["pearson", "clewi2024"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
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


@checks.arguments
def align(
    symmetry: Symmetry,
    model: nn.Module,
    reference: Weights,
    moving: Weights,
    inputs: Tensor | None = None,
    *,
    by: Literal["activations", "weights"] = "activations",
    statistic: Statistic = "pearson",
    batch: Count = 32,
    generator: torch.Generator | None = None,
) -> Alignment:
    """Finds the permutations that make `moving` look like `reference`; `permute` then applies them.

    By activations (git re-basin 2209.04836, CLeWI 2404.04002): one pass of both networks over `inputs` (N, ...), in
    evaluation mode. For each group come the `similarities` of its units, then one linear assignment that maximises
    their sum. All axes of a residual stream are one group, so shortcuts need no permutations of their own
    ("junctures"). Blocks (heads, groups of a convolution) are matched by how well their members match. The papers
    leave open what becomes of units that never vary (dead ReLUs): here their weights tell them apart.

    By weights (git re-basin, algorithm 1): each group in turn gets the assignment that maximises the inner product of
    all parameters, the others held, until nothing changes. The first round goes from the input to the output;
    `generator` draws the order of later ones. Weights of grouped convolutions do not take part, for what they say
    about one axis depends on the other. Running statistics are no parameters.

    `model` is any model of the architecture; it is left as it is. Units of its frozen parts stay where they are. Raises
    ValueError for weights that do not fit the symmetry or are not finite, and for no inputs.
    """
    for name, weights in (("reference", reference), ("moving", moving)):
        check_weights(symmetry, weights, name)
        check_finite(weights, name)
    still = frozen_tensors(model)
    held = {symmetry.root(g) for g, places in symmetry.places.items() if any(name in still for name, *_ in places)}
    free = [root for root in symmetry.roots if root not in held]
    if by == "weights":
        permutations = _match_weights(symmetry, free, reference, moving, generator or torch.Generator().manual_seed(0))
        pair = _Pair(symmetry, reference, moving, permutations)
        return _result(symmetry, permutations, {g: pair.cosines(g) for g in symmetry.groups}, {})
    if inputs is None or not len(inputs):
        raise ValueError("inputs: matching by activations needs examples, got none; pass some or use by='weights'")
    found = similarities(symmetry, model, reference, moving, inputs, statistic=statistic, batch=batch)
    permutations = _match_activations(symmetry, free, found, reference, moving)
    vague = {g: int((a | b).sum()) for g, (a, b) in found.constant.items()}
    return _result(symmetry, permutations, found.matrix, {g: n for g, n in vague.items() if n})


@dataclass(frozen=True, eq=False)
class Similarities:
    """By group: `matrix[i, j]`, how alike unit i of the reference and unit j of the moving network are.

    `constant` holds, for both networks, which units never vary; their entries are 0.
    """

    matrix: dict[str, NDArray[np.float64]]
    constant: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]


@torch.no_grad()
@checks.arguments
def similarities(
    symmetry: Symmetry,
    model: nn.Module,
    reference: Weights,
    moving: Weights,
    inputs: Tensor,
    *,
    statistic: Statistic = "pearson",
    batch: Count = 32,
) -> Similarities:
    """Compares the units of two networks on `inputs` (N, ...) by Pearson's correlation over examples and positions.

    Entries are in [-1, 1]; those of a residual stream are means over the places where it is read. Deviations from the
    first batch's means are multiplied batch by batch, in the precision of the activations (float32 at least). The
    products are added up in double precision. Raises ValueError for a model of several inputs.

    `statistic="clewi2024"` is what CLeWI's released code computes: it divides by the number of images where that of
    positions belongs. Let c be the covariance of two units over HW positions an image, m their means, s their
    deviations. It is (c - (HW - 1) m1 m2) / (d1 d2) with d^2 = s^2 + (HW - 1)^2 m^2: correlation only where HW = 1.
    """
    moments = {tap: [_Moments(tap, group, slots) for group, slots in tap.slots.items()] for tap in symmetry.taps}

    def look(tap: Tap, values: list[Tensor]) -> None:
        for m in moments[tap]:
            m.add(values)

    symmetry.watch(model, (reference, moving), inputs, look, batch=batch)
    matrix: dict[str, NDArray[np.float64]] = {}
    constant: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {}
    times: dict[str, int] = {}
    for m in (m for ms in moments.values() for m in ms):
        found, (a, b) = m.compare(len(inputs) if statistic == "clewi2024" else None)
        c, d = constant.get(m.group, (True, True))
        matrix[m.group], constant[m.group] = matrix.get(m.group, 0.0) + found, (a & c, b & d)
        times[m.group] = times.get(m.group, 0) + 1
    return Similarities({g: total / times[g] for g, total in matrix.items()}, constant)


class _Moments:
    """Sums over positions of the values of one group's units in two networks, of their squares and products."""

    def __init__(self, tap: Tap, group: str, slots: Ids) -> None:
        self.tap, self.group, self.slots, self.count = tap, group, slots, 0
        self.shift: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.products = torch.zeros(())

    def add(self, values: list[Tensor]) -> None:
        """Takes one batch's values of both networks."""
        now = []
        for k, value in enumerate(values):
            view = self.tap.read(value)
            places, rest = len(self.tap.places), tuple(range(len(self.tap.places), view.ndim))
            if len(self.shift) == k:
                self.shift.append(view.to(torch.promote_types(view.dtype, torch.float32)).mean(rest, keepdim=True))
            rows = torch.empty(view.shape, dtype=self.shift[k].dtype, device=view.device)
            rows = torch.sub(view, self.shift[k], out=rows).flatten(places).flatten(0, -2)
            now.append(self._pick(rows))
        if not self.count:
            self.sums = [v.new_zeros(v.shape[:2], dtype=torch.float64) for v in now]
            self.squares = [s.clone() for s in self.sums]
            self.products = torch.zeros(len(now[0]), now[0].shape[1], now[1].shape[1], dtype=torch.float64)
            self.products = self.products.to(now[0].device)
        self.count += now[0].shape[2]
        for k, rows in enumerate(now):
            self.sums[k] += rows.sum(2)
            self.squares[k] += torch.linalg.vector_norm(rows, dim=2).square()
        self.products += now[0] @ now[1].mT

    def _pick(self, rows: Tensor) -> Tensor:
        """The rows of the group's units, as (lanes, units, positions in the data)."""
        if self.slots.size != len(rows) or (np.diff(self.slots.ravel()) != 1).any():
            rows = rows[torch.from_numpy(self.slots.ravel()).to(rows.device)]
        return rows.unflatten(0, self.slots.shape)

    def compare(self, images: int | None) -> tuple[NDArray[np.float64], list[NDArray[np.bool_]]]:
        """The similarities of all pairs, a mean over lanes, and which units are constant, of either network.

        `images`: their number for the statistic of CLeWI's code, None for Pearson's.
        """
        offsets = [s / self.count for s in self.sums]
        means = [
            self._pick(shift.double().flatten()[:, None])[..., 0] + offset
            for shift, offset in zip(self.shift, offsets, strict=True)
        ]
        spreads = [s / self.count - o.square() for s, o in zip(self.squares, offsets, strict=True)]
        spreads = [torch.where(v > 1e-12 * m.square(), v, 0.0).sqrt() for v, m in zip(spreads, means, strict=True)]
        shared = self.products / self.count - offsets[0][:, :, None] * offsets[1][:, None, :]
        constant = [(s == 0).all(0).cpu().numpy() for s in spreads]
        least = 0.0
        if images:
            n, wide = self.count, self.count / images
            shared = wide * (shared - (wide - 1) * means[0][:, :, None] * means[1][:, None, :])
            spreads = [
                (n / max(n - 1, 1) * wide * (s.square() + (wide - 1) ** 2 * m.square())).sqrt()
                for s, m in zip(spreads, means, strict=True)
            ]
            least = 1e-4
        scale = spreads[0][:, :, None] * spreads[1][:, None, :] + least
        matrix = torch.where(scale > 0, shared / scale, 0.0).clamp(-1, 1)
        return matrix.mean(0).cpu().numpy(), constant


def assign(symmetry: Symmetry, matrices: Matrices, groups: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The permutations (units,) that maximise the sum of similarities (units, units); units without any stay.

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
    symmetry: Symmetry, free: list[str], found: Similarities, reference: Weights, moving: Weights
) -> dict[str, Tensor]:
    """`assign` of free groups, with the weights to tell apart units that look alike, never vary or are not seen."""
    blind = {g: np.zeros((group.units,) * 2) for g, group in symmetry.groups.items() if not symmetry.members[g]}
    matrices = blind | found.matrix
    vague = {g: (_ties(m), _ties(m.T)) for g, m in matrices.items()}
    vague = {g: ties for g, ties in vague.items() if min(map(len, ties)) > 1}

    def with_hints(root: str, permutations: Permutations) -> Matrices:
        hinted, pair = dict(matrices), _Pair(symmetry, reference, moving, permutations)
        for g in (g for g in symmetry.family(root) if g in vague):
            hinted[g] = hinted[g].copy()
            hinted[g][np.ix_(*vague[g])] += HINT * pair.cosines(g, *vague[g])
        return hinted

    roots = [root for root in dict.fromkeys(symmetry.root(g) for g in vague) if root in free]
    return _in_turn(symmetry, identity(symmetry) | assign(symmetry, matrices, free), roots, with_hints)


def _ties(matrix: NDArray[np.float64]) -> Ids:
    """The rows whose largest entry is not the largest by more than `ALIKE`."""
    if matrix.shape[1] < 2:
        return np.arange(len(matrix))
    best = np.partition(matrix, -2, axis=1)[:, -2:]
    return np.flatnonzero(best[:, 1] - best[:, 0] <= ALIKE)


def _match_weights(
    symmetry: Symmetry, free: list[str], reference: Weights, moving: Weights, generator: torch.Generator
) -> dict[str, Tensor]:
    def products(root: str, permutations: Permutations) -> Matrices:
        pair = _Pair(symmetry, reference, moving, permutations)
        return {g: pair.compare(g)[0] for g in symmetry.family(root)}

    return _in_turn(symmetry, identity(symmetry), free, products, generator)


def _in_turn(
    symmetry: Symmetry,
    permutations: dict[str, Tensor],
    roots: list[str],
    compare: Callable[[str, Permutations], Matrices],
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Assigns one root's groups after the other, the rest held, until nothing changes; `generator` shuffles rounds."""
    order = roots
    for _ in range(ROUNDS if roots else 0):
        before = dict(permutations)
        for root in order:
            permutations |= assign(symmetry, compare(root, permutations), [root])
        if all(torch.equal(before[g], p) for g, p in permutations.items()):
            break
        if generator:
            order = [roots[k] for k in torch.randperm(len(roots), generator=generator)]
    return permutations


class _Pair:
    """Inner products of the parameters of two networks, the second permuted."""

    def __init__(
        self, symmetry: Symmetry, reference: Weights, moving: Weights, permutations: Mapping[str, Tensor]
    ) -> None:
        self.symmetry, self.reference, self.moving = symmetry, reference, moving
        self.element = Element.of(symmetry.groups, permutations)

    def cosines(self, name: str, rows: Ids | None = None, columns: Ids | None = None) -> NDArray[np.float64]:
        """Of each two units: their inner product over their lengths, 0 where there is nothing."""
        products, lengths = self.compare(name, rows, columns)
        return np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)

    def compare(
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

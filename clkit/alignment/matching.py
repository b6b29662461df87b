"""Matching: which unit of one network corresponds to which of another, by their activations or by their weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, cycle, islice
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clkit import checks
from clkit.alignment.assignment import ROUNDS, TIE, Matrices, Matrix, Pair, assign, in_turn
from clkit.alignment.similarity import Moments, Statistic, mean, measure
from clkit.checks import Count
from clkit.modules import frozen_tensors
from clkit.symmetry import Permutations, Symmetry, compose, identity, invert, permute
from clkit.symmetry.points import Ids
from clkit.symmetry.structure import check_weights
from clkit.weights import Weights, check_finite, combine, equal

By = Literal["activations", "weights"]
HINT = 1e-4  # what weights count beside correlations, where these tie
ALIKE = 1e-5  # correlations that differ less tie: rounding of activations


@dataclass(frozen=True, eq=False)
class Alignment:
    """How to permute the moving weights to look like the reference, and how alike they are then, by group.

    `permutations`; `similarity`, a mean over matched units (of correlations; of cosines if matched by weights; of
    their members for blocks); `unmoved`, the share of units that stay; `degenerate`, how many units are like none of
    the other network's, for groups that have such. By activations these never vary in one of the networks, and their
    weights told them apart; by weights, all their inner products are 0. Of many networks, the reference is the mean of
    the others.
    """

    permutations: dict[str, Tensor]
    similarity: dict[str, float]
    unmoved: dict[str, float]
    degenerate: dict[str, int]


@checks.arguments
def align(
    symmetry: Symmetry,
    model: nn.Module,
    reference: Weights,
    moving: Weights,
    inputs: Tensor | None = None,
    *,
    by: By = "activations",
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

    Where one activation holds several axes that move (tokens and channels), what it says about one depends on the
    others. Such a group begins with what other activations say, or with values sorted along the other axes. Then
    these groups take turns, each with a pass over `inputs` in which all are permuted as found so far, as long as the
    sum of similarities grows.

    By weights (git re-basin, algorithm 1): each group in turn gets the assignment that maximises the inner product of
    all parameters, the others held, until nothing changes. The first round goes through the groups as the model
    registers their weights; `generator` draws the order of later ones and stays as it is. A group on two axes of one
    weight takes a step only if the product grows. Weights of convolutions in groups of several inputs do not take part,
    for what they say about one axis depends on the other. Running statistics are no parameters.

    `model` is any model of the architecture; it is left as it is. Units of its frozen parts stay where they are. Raises
    ValueError for weights that do not fit the symmetry or are not finite, and for no inputs.
    """
    nets = {"reference": reference, "moving": moving}
    if by == "weights":
        return _ByWeights(symmetry, model, nets, generator).align()[1]
    return _ByActivations(symmetry, model, nets, inputs, statistic, batch).align()[1]


@checks.arguments
def align_many(
    symmetry: Symmetry,
    model: nn.Module,
    networks: Sequence[Weights],
    inputs: Tensor | None = None,
    *,
    by: By = "activations",
    statistic: Statistic = "pearson",
    batch: Count = 32,
    generator: torch.Generator | None = None,
) -> list[Alignment]:
    """Finds, for each of several networks, the permutations that bring all to the order of the first, which stays.

    Each network in turn is matched to the mean of the others as they then stand, until none moves (git re-basin
    2209.04836, algorithm 3). At every step the sum over pairs of networks grows: of the inner products of their
    parameters, or of the correlations of matched units. The latter come from one pass of all networks, and from more
    for groups beside others, as `align` says. Added up over the others, they are covariances with the sum of the
    others' standardised activations.

    By activations a square of numbers is held for each pair of networks, group and place that shows it: ten ViT-B take
    56 GB, and ValueError is raised beforehand where they are not free.

    The paper begins with the networks as they are. Here all are first matched to the one that is most like the others
    and then take turns by how alike they are, so their order in the list counts only among ties. Two networks get
    what `align` finds. Arguments and errors are those of `align`.
    """
    if len(networks) < 2:
        raise ValueError(f"networks: {len(networks)}; a common order takes two or more")
    nets = {f"networks[{k}]": weights for k, weights in enumerate(networks)}
    if by == "weights":
        return _ByWeights(symmetry, model, nets, generator).align()
    return _ByActivations(symmetry, model, nets, inputs, statistic, batch).align()


Found = list[dict[str, Tensor]]  # how each network is permuted so far


@dataclass(eq=False)
class _Matcher:
    """Networks on the way to a common order."""

    symmetry: Symmetry
    model: nn.Module
    named: Mapping[str, Weights]

    def __post_init__(self) -> None:
        for name, weights in self.named.items():
            check_weights(self.symmetry, weights, name)
            check_finite(weights, name)
        still, groups = frozen_tensors(self.model), [*self.symmetry.groups]
        axes = [axis for name, some in self.symmetry.axes.items() if name in still for axis in some]
        held = {self.symmetry.root(groups[g]) for axis in axes for g in np.unique(axis.group) if g >= 0}
        self.free = [root for root in self.symmetry.roots if root not in held]
        self.nets, self.order = [*self.named.values()], [*range(len(self.named))]

    def step(self, found: Found, k: int, others: list[int], roots: list[str]) -> dict[str, Tensor]:
        """How network k must move on to look like the mean of others, in the groups of some roots."""
        raise NotImplementedError

    def alike(self, found: Found, k: int, others: list[int]) -> Matrices:
        """How alike the units of the mean of others and those of network k are, as they stand."""
        raise NotImplementedError

    def value(self, found: Found, *pairs: tuple[int, int]) -> float:
        """How alike the matched units of pairs of networks are, in sum."""
        return float(sum(m.trace() for j, k in pairs for m in self.alike(found, k, [j]).values()))

    def run(self) -> Found:
        """Matches all networks to the one that is most like the others, and then in turns."""
        start, pairs = [identity(self.symmetry) for _ in self.nets], [*combinations(self.order, 2)]
        steps = {(j, k): self.step(start, k, [j], self.free) for j, k in pairs}
        if len(pairs) == 1:
            self.order = [1]
            return [start[0], steps[0, 1]]
        steps |= {(k, j): invert(steps[j, k]) for j, k in pairs}
        values = {pair: self.value([steps.get((pair[0], k), p) for k, p in enumerate(start)], pair) for pair in pairs}
        first, *rest = sorted(self.order, key=lambda k: -sum(value for pair, value in values.items() if k in pair))
        self.order = [*rest, first]
        return self.turns([steps.get((first, k), start[k]) for k in range(len(start))], self.free)

    def turns(self, found: Found, roots: list[str]) -> Found:
        """Matches each network to the mean of the others until none moves."""
        found, settled = [*found], set()
        for k in islice(cycle(self.order), ROUNDS * len(found)):
            step = self.step(found, k, [j for j in range(len(found)) if j != k], roots)
            if not equal(step, identity(self.symmetry)):
                found[k], settled = compose(found[k], step), set()
            settled.add(k)
            if len(settled) == len(self.order):
                break
        return found

    def pair(self, found: Found, k: int, others: list[int]) -> tuple[Weights, Weights]:
        """The mean of others, and network k, as they stand."""
        moving, *rest = (permute(self.symmetry, found[i], self.nets[i]) for i in (k, *others))
        return combine(rest, [1 / len(rest)] * len(rest)), moving

    def align(self) -> list[Alignment]:
        """The whole way, in the order of the first network."""
        found = self.run()
        found = [compose(permutations, invert(found[0])) for permutations in found]
        return [self.result(found, k) for k in range(len(found))]

    def result(self, found: Found, k: int) -> Alignment:
        """How network k came to where it is, and how much it looks like the mean of the others there."""
        matrices = self.alike(found, k, [j for j in range(len(found)) if j != k])
        similarity: dict[str, float] = {}
        for g in reversed(self.symmetry.groups):
            if g in matrices and matrices[g].any():
                similarity[g] = float(matrices[g].diagonal().mean())
            elif inside := [similarity[m] for m in self.symmetry.members[g] if m in similarity]:
                similarity[g] = sum(inside) / len(inside)
        constant = {g: int((~m.any(0) | ~m.any(1)).sum()) for g, m in matrices.items()}
        return Alignment(
            found[k],
            {g: similarity[g] for g in self.symmetry.groups if g in similarity},
            {g: float((p == torch.arange(len(p))).double().mean()) for g, p in found[k].items()},
            {g: n for g, n in constant.items() if n},
        )


@dataclass(eq=False)
class _ByWeights(_Matcher):
    generator: torch.Generator | None

    def step(self, found: Found, k: int, others: list[int], roots: list[str]) -> dict[str, Tensor]:
        pair = partial(Pair, self.symmetry, *self.pair(found, k, others))
        draws = self.generator.clone_state() if self.generator else torch.Generator().manual_seed(0)

        def products(root: str, permutations: Permutations) -> Matrices:
            return {g: pair(permutations).products(g)[0] for g in self.symmetry.family(root)}

        return in_turn(self.symmetry, identity(self.symmetry), roots, products, draws, pair)

    def alike(self, found: Found, k: int, others: list[int]) -> Matrices:
        pair = Pair(self.symmetry, *self.pair(found, k, others), {})
        return {g: pair.cosines(g) for g, places in self.symmetry.places.items() if places}


@dataclass(eq=False)
class _ByActivations(_Matcher):
    """What a group shows alone is measured once; what it shows beside others, with the networks as they stand."""

    inputs: Tensor | None
    statistic: Statistic
    batch: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inputs is None or not len(self.inputs):
            raise ValueError("inputs: matching by activations needs examples, got none; pass some or use by='weights'")
        images = len(self.inputs) if self.statistic == "clewi2024" else None
        watch = partial(self.symmetry.watch, self.model, inputs=self.inputs, batch=self.batch)
        self.measure = partial(measure, watch, images)
        alone, self.beside = [], []
        for tap in self.symmetry.taps:
            moving = {self.symmetry.root(g) for groups in tap.others.values() for g in groups} & {*self.free}
            (self.beside if moving else alone).extend((tap, group) for group in tap.slots)
        self.clear = {group for _, group in alone}
        moments = [Moments(*place) for place in alone]
        moments += [Moments(*place, ordered=True) for place in self.beside if place[1] not in self.clear]
        numbers = len([*combinations(self.nets, 2)]) * sum(m.slots.size * m.slots.shape[1] for m in moments)
        checks.room("networks: their correlations", 8 * numbers, self.inputs.device, "align fewer, or by weights")
        first = self.measure(self.nets, moments)
        self.alone = {pair: shown[: len(alone)] for pair, shown in first.items()}
        self.seen = {pair: mean(shown) for pair, shown in first.items()}

    def run(self) -> Found:
        """After that, groups beside others take turns as long as the networks become more alike."""
        found, pairs = super().run(), [*self.seen]
        roots = [r for r in dict.fromkeys(self.symmetry.root(g) for _, g in self.beside) if r in self.free]
        hidden = [r for r in roots if self.clear.isdisjoint(self.symmetry.family(r))]
        parts, settled = [hidden, roots, *([root] for root in roots)] if roots else [], set()
        if roots:
            self.look(found)
        for i, part in cycle(enumerate(parts)):
            new, seen, value = self.turns(found, part), self.seen, self.value(found, *pairs)
            settled.add(i)
            if not all(map(equal, new, found)):
                self.look(new)
                if self.value(new, *pairs) > value + TIE:
                    found, settled = new, set()
                else:
                    self.seen = seen
            if len(settled) == len(parts):
                break
        return found

    def look(self, found: Found) -> None:
        """Measures again what groups show beside others."""
        nets = [permute(self.symmetry, p, net) for p, net in zip(found, self.nets, strict=True)]
        back = [invert(permutations) for permutations in found]
        shown = self.measure(nets, [Moments(*place) for place in self.beside])
        self.seen = {
            (j, k): mean(self.alone[j, k] + [(g, _ordered(m, back[j][g], back[k][g])) for g, m in rows])
            for (j, k), rows in shown.items()
        }

    def step(self, found: Found, k: int, others: list[int], roots: list[str]) -> dict[str, Tensor]:
        """Matches by similarities; weights tell apart units that look alike, never vary or are not seen."""
        groups = [g for root in roots for g in self.symmetry.family(root)]
        blind = {g: np.zeros((self.symmetry.groups[g].units,) * 2) for g in groups if not self.symmetry.members[g]}
        matrices = blind | self.alike(found, k, others)
        vague = {g: (_ties(matrices[g]), _ties(matrices[g].T)) for g in groups if g in matrices}
        vague = {g: ties for g, ties in vague.items() if min(map(len, ties)) > 1}
        step = identity(self.symmetry) | assign(self.symmetry, matrices, roots)
        if not vague:
            return step
        pair = partial(Pair, self.symmetry, *self.pair(found, k, others))

        def with_hints(root: str, permutations: Permutations) -> Matrices:
            hinted = dict(matrices)
            for g in (g for g in self.symmetry.family(root) if g in vague):
                hinted[g] = hinted[g].copy()
                hinted[g][np.ix_(*vague[g])] += HINT * pair(permutations).cosines(g, *vague[g])
            return hinted

        return in_turn(self.symmetry, step, [*dict.fromkeys(map(self.symmetry.root, vague))], with_hints)

    def alike(self, found: Found, k: int, others: list[int]) -> Matrices:
        pairs = [(j, k) if j < k else (k, j) for j in others]
        now = [{g: _ordered(m, *(found[i][g] for i in pair)) for g, m in self.seen[pair].items()} for pair in pairs]
        now = [m if pair[1] == k else {g: some.T for g, some in m.items()} for m, pair in zip(now, pairs, strict=True)]
        return {g: np.mean([m[g] for m in now], axis=0) for g in now[0]}


def _ordered(matrix: Matrix, rows: Tensor, columns: Tensor) -> Matrix:
    return matrix[np.ix_(rows.numpy(), columns.numpy())]


def _ties(matrix: NDArray[np.float64]) -> Ids:
    """The rows whose largest entry is not the largest by more than `ALIKE`."""
    if matrix.shape[1] < 2:
        return np.arange(len(matrix))
    best = np.partition(matrix, -2, axis=1)[:, -2:]
    return np.flatnonzero(best[:, 1] - best[:, 0] <= ALIKE)

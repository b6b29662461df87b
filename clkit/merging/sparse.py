"""Merges of task vectors that leave entries out: by magnitude (TIES, Breadcrumbs), by lot (DARE), by both (DELLA).

`density` is the share of entries kept. Where it is a matter of magnitude, exactly ceil(density n) of n are kept; of
equal magnitudes the first in order. Lots are drawn on the CPU, so that all devices agree.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clkit.merging.pieces import Piece, TaskVectors
from clkit.merging.vectors import Draws, agreed, count, finite, share, tops
from clkit.weights import Weights


def ties(
    ws: Sequence[Weights], *, base: Weights, density: float = 0.2, scale: float = 1.0, whole: bool = True
) -> dict[str, Tensor]:
    """`base` plus `scale` times the mean of what is left of the task vectors after trimming and electing signs.

    Trim: each task vector keeps its `density` largest magnitudes, over all weights as one vector, as in the paper, or
    tensor by tensor with `whole=False`. Elect: at each entry the sign of the sum. Merge: the mean of the entries with
    that sign, trimmed ones not counted. The paper keeps 20 % and takes scale = 1 where it cannot be tuned.

    Where the sum is exactly zero no sign is elected and nothing moves, as the paper's formula has it; the released code
    takes the sign that most entries elected, and the negative one where that is zero, too, so that tau and -tau merge
    to -|tau|. It keeps int(density n) + 1 entries and all ties. mergekit trims tensor by tensor and elects a plus for
    zero.

    Ref: Yadav et al., TIES-Merging, arXiv 2306.01708, algorithm 1.
    """
    density, scale = share("density", density), finite("scale", scale)
    vectors = TaskVectors(ws, base)
    top = tops(vectors, lambda n: (count(density, n),), whole) if density < 1 else None

    def rule(piece: Piece, part: Tensor) -> Tensor:
        return agreed(part.mul_(top[piece.name][0](part.abs())) if top else part)

    return vectors.merge(rule, scale)


def breadcrumbs(
    ws: Sequence[Weights],
    *,
    base: Weights,
    density: float = 0.143,
    outliers: float = 0.007,
    scale: float | None = None,
    whole: bool = False,
) -> dict[str, Tensor]:
    """`base` plus `scale` times the sum of the task vectors without their largest and their smallest entries.

    Of n entries the floor(outliers n) of largest magnitude are left out and the next ceil(density n) are kept,
    tensor by tensor, as in the paper, or over all weights. The paper's example removes what lies below the 85th and
    above the 99.3rd percentile; its scale is tuned, as in task arithmetic (None stands for 1 / n tasks, the mean).
    mergekit rounds both numbers down.

    Ref: Davari and Belilovsky, Model Breadcrumbs, arXiv 2312.06795.
    """
    density, outliers = share("density", density), share("outliers", outliers, open_low=False)
    if density + outliers > 1:
        raise ValueError(f"outliers: {outliers} and density {density} are above 1 together; lower one of them")
    vectors = TaskVectors(ws, base)
    factor = finite("scale", 1 / len(ws) if scale is None else scale)

    def counts(size: int) -> tuple[int, int]:
        largest = math.floor(round(outliers * size, 6))
        return largest, min(size, largest + count(density, size))

    top = tops(vectors, counts, whole)

    def rule(piece: Piece, part: Tensor) -> Tensor:
        largest, kept = top[piece.name]
        size = part.abs()
        return part.mul_(kept(size) & ~largest(size)).sum(0)

    return vectors.merge(rule, factor)


def dare(
    ws: Sequence[Weights], *, base: Weights, density: float = 0.5, scale: float | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """`base` plus `scale` times the sum of the task vectors, entries dropped by lot and the rest divided by `density`.

    Each entry is kept with probability `density` (1 minus the paper's drop rate), independently, so that its
    expectation stays what it was: numbers kept are exact in law only. The paper tries drop rates from 0.1 to 0.99 and
    leaves the choice to tuning; we keep half. `scale` is task arithmetic's; None stands for 1 / n, the mean.

    Ref: Yu et al., Language models are super Mario, arXiv 2311.03099.
    """
    return _dropped(ws, base, density, scale, seed, lambda part: part.sum(0), 1 / max(len(ws), 1))


def dare_ties(
    ws: Sequence[Weights], *, base: Weights, density: float = 0.5, scale: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """`base` plus `scale` times the mean of those dropped and rescaled task vectors that agree with the elected sign.

    DARE's drop in the place of TIES' trim, then TIES. The code of the DARE paper trims after the drop as well; mergekit
    adds up the entries that agree unless it is told to normalise.

    Ref: Yu et al., arXiv 2311.03099; Yadav et al., arXiv 2306.01708.
    """
    return _dropped(ws, base, density, scale, seed, agreed, 1.0)


def _dropped(
    ws: Sequence[Weights],
    base: Weights,
    density: float,
    scale: float | None,
    seed: int,
    reduce: Callable[[Tensor], Tensor],
    default: float,
) -> dict[str, Tensor]:
    density, factor = share("density", density), finite("scale", default if scale is None else scale)
    vectors, draws = TaskVectors(ws, base), Draws(seed, len(ws))

    def rule(piece: Piece, part: Tensor) -> Tensor:
        if density < 1:
            part.mul_(draws.below(density, part.shape[1]).to(part.device)).div_(density)
        return reduce(part)

    return vectors.merge(rule, factor)


def della(
    ws: Sequence[Weights],
    *,
    base: Weights,
    density: float = 0.5,
    epsilon: float = 0.1,
    scale: float = 1.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """`base` plus `scale` times the mean of those task vectors that agree, small entries dropped more often by lot.

    Within a row of a tensor (its first axis; a tensor of 0 or 1 axis is one row) the probability of being kept rises
    evenly with the rank of the magnitude, from density - epsilon / 2 for the smallest to density + epsilon / 2 for the
    largest; a row of one entry has `density`. What is kept is divided by its probability, so that expectations stay.
    Then signs are elected as in TIES. The paper tunes all three numbers. mergekit spreads the probabilities by epsilon
    to both sides and rescales a whole tensor by a norm.

    Ref: Deep et al., DELLA-Merging, arXiv 2406.11617.
    """
    density, scale, half = share("density", density), finite("scale", scale), finite("epsilon", epsilon) / 2
    if half < 0 or density - half <= 0 or density + half > 1:
        raise ValueError(
            f"epsilon: {epsilon} takes the density {density} out of (0, 1]; give at most "
            f"{2 * min(density, 1 - density):g}, and 0 at density 1"
        )
    vectors, draws = TaskVectors(ws, base, rows=True), Draws(seed, len(ws))

    def rule(piece: Piece, part: Tensor) -> Tensor:
        shape = base[piece.name].shape
        row = part.shape[1] if len(shape) < 2 else shape[1:].numel()
        ranks = part.view(len(ws), -1, row).abs().argsort(dim=-1, stable=True).argsort(dim=-1).view_as(part)
        place = ranks.to(part.dtype) / (row - 1) if row > 1 else torch.full_like(part, 0.5)
        kept = (density - half) + 2 * half * place
        return agreed(part.mul_(draws.below(kept, part.shape[1]).to(part.device)).div_(kept))

    return vectors.merge(rule, scale)

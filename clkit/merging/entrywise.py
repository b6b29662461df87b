"""Merges that choose, entry by entry, what is left of the task vectors: by magnitude, by lot, by sign, or by merit.

`density` is the share of entries kept. Where it is a matter of magnitude, exactly ceil(density n) of n are kept; of
equal magnitudes the first in order. Lots are drawn on the CPU, so that all devices agree.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from clkit import checks
from clkit.merging import pieces
from clkit.merging.pieces import Density, Draws, Piece, Scale, Seed, TaskVectors, count, largest, on_parameters
from clkit.weights import Weights


@on_parameters()
def ties(
    ws: Sequence[Weights], *, base: Weights, density: Density = 0.2, scale: Scale = 1.0, whole: bool = True
) -> dict[str, Tensor]:
    """`base` plus `scale` times the mean of what is left of the task vectors after trimming and electing signs.

    Trim: of task vectors (n, entries), each keeps its `density` largest magnitudes. They are ranked over all weights as
    one vector, as in the paper, or tensor by tensor with `whole=False`. Elect: at each entry the sign of the sum.
    Merge: the mean of the entries with that sign, trimmed ones not counted. The paper keeps 20 % and takes scale = 1
    where it cannot be tuned.

    Where the sum is exactly zero no sign is elected and nothing moves, as the paper's formula has it. The released code
    takes the sign that most entries elected, and the negative one where that is zero, too: tau and -tau merge to
    -|tau|. It keeps int(density n) + 1 entries and all ties. mergekit trims tensor by tensor and elects a plus for
    zero.

    Ref: Yadav et al., TIES-Merging, arXiv 2306.01708, algorithm 1.
    """
    vectors = TaskVectors(ws, base)
    kept = largest(vectors, partial(count, density), whole)
    return vectors.merge(lambda piece, part: agreed(part.mul_(kept(piece, part.abs()))), scale)


@on_parameters()
def breadcrumbs(
    ws: Sequence[Weights],
    *,
    base: Weights,
    density: Density = 0.143,
    outliers: Annotated[float, checks.Range(0, 1, means="the share of entries left out as too large")] = 0.007,
    scale: Scale | None = None,
    whole: bool = False,
) -> dict[str, Tensor]:
    """`base` plus `scale` times the sum of the task vectors without their largest and their smallest entries.

    Of n entries the floor(outliers n) of largest magnitude are left out and the next ceil(density n) are kept. Entries
    are ranked tensor by tensor, as in the paper, or over all weights. The paper's example removes what lies below the
    85th and above the 99.3rd percentile; its scale is tuned, as in task arithmetic (None stands for 1 / n tasks, the
    mean). mergekit rounds both numbers down. Raises ValueError where the two shares exceed 1 together.

    Ref: Davari and Belilovsky, Model Breadcrumbs, arXiv 2312.06795.
    """
    if density + outliers > 1:
        raise ValueError(f"outliers: {outliers} and density {density} are above 1 together; lower one of them")
    vectors = TaskVectors(ws, base)

    def left_out(size: int) -> int:
        return math.floor(round(outliers * size, 6))

    above = largest(vectors, left_out, whole)
    kept = largest(vectors, lambda size: min(size, left_out(size) + count(density, size)), whole)

    def rule(piece: Piece, part: Tensor) -> Tensor:
        size = part.abs()
        return part.mul_(kept(piece, size) & ~above(piece, size)).sum(0)

    return vectors.merge(rule, 1 / len(ws) if scale is None else scale)


@on_parameters()
def dare(
    ws: Sequence[Weights], *, base: Weights, density: Density = 0.5, scale: Scale | None = None, seed: Seed = 0
) -> dict[str, Tensor]:
    """`base` plus `scale` times the sum of the task vectors, entries dropped by lot and the rest divided by `density`.

    Each of the (n, entries) is kept with probability `density` (1 minus the paper's drop rate), independently, so that
    its expectation stays what it was: numbers kept are exact in law only. The paper tries drop rates from 0.1 to 0.99
    and leaves the choice to tuning; we keep half. `scale` is task arithmetic's; None stands for 1 / n, the mean.

    Ref: Yu et al., Language models are super Mario, arXiv 2311.03099.
    """
    vectors, draws = TaskVectors(ws, base), Draws(seed, len(ws))
    factor = 1 / len(ws) if scale is None else scale
    return vectors.merge(lambda piece, part: draws.drop(part, density).sum(0), factor)


@on_parameters()
def dare_ties(
    ws: Sequence[Weights], *, base: Weights, density: Density = 0.5, scale: Scale = 1.0, seed: Seed = 0
) -> dict[str, Tensor]:
    """`base` plus `scale` times the mean of those dropped and rescaled task vectors that agree with the elected sign.

    DARE's drop of (n, entries) in the place of TIES' trim, then TIES. The code of the DARE paper trims after the drop
    as well. mergekit adds up the entries that agree unless it is told to normalise.

    Ref: Yu et al., arXiv 2311.03099; Yadav et al., arXiv 2306.01708.
    """
    vectors, draws = TaskVectors(ws, base), Draws(seed, len(ws))
    return vectors.merge(lambda piece, part: agreed(draws.drop(part, density)), scale)


@on_parameters()
def della(
    ws: Sequence[Weights],
    *,
    base: Weights,
    density: Density = 0.5,
    epsilon: checks.NotNegative = 0.1,
    scale: Scale = 1.0,
    seed: Seed = 0,
) -> dict[str, Tensor]:
    """`base` plus `scale` times the mean of those task vectors that agree, small entries dropped more often by lot.

    Within a row of a tensor the probability of being kept rises evenly with the rank of the magnitude: from density -
    epsilon / 2 for the smallest to density + epsilon / 2 for the largest. Rows are those of the first axis; a tensor of
    0 or 1 axis is one row, and a row of one entry has `density`. What is kept is divided by its probability, so that
    expectations stay. Then signs are elected as in TIES. The paper tunes all three numbers. mergekit spreads the
    probabilities by epsilon to both sides and rescales a whole tensor by a norm.

    Raises ValueError for an `epsilon` that leads to probabilities outside (0, 1].

    Ref: Deep et al., DELLA-Merging, arXiv 2406.11617.
    """
    half = epsilon / 2
    if density - half <= 0 or density + half > 1:
        most = f"{2 * min(density, 1 - density):g}"
        raise ValueError(f"epsilon: {epsilon} takes the density {density} out of (0, 1]; give at most {most}")
    vectors, draws = TaskVectors(ws, base, rows=True), Draws(seed, len(ws))

    def rule(piece: Piece, part: Tensor) -> Tensor:
        shape = base[piece.name].shape
        row = part.shape[1] if len(shape) < 2 else shape[1:].numel()
        order = pieces.ascending(part.view(len(ws), -1, row).abs())
        place = torch.arange(row).to(part) / (row - 1) if row > 1 else part.new_tensor([0.5])
        kept = ((density - half) + 2 * half * place).expand(order.shape)
        return agreed(draws.drop(part, torch.empty_like(kept).scatter_(-1, order, kept).view_as(part)))

    return vectors.merge(rule, scale)


@on_parameters()
def magmax(ws: Sequence[Weights], *, base: Weights, scale: Scale = 1.0) -> dict[str, Tensor]:
    """`base` plus `scale` times, at every entry, the entry of largest magnitude among the task vectors.

    Of (n, entries) it is one for each of the entries, whichever task has it. The paper merges weights trained one task
    after the other and tunes the scale (0.5 is common); 1 gives a copy for copies. Where the largest entries of both
    signs tie, nothing moves, so that neither order nor sign matters; released code takes the last.

    Ref: Marczak et al., MagMax, arXiv 2407.06322.
    """

    def strongest(piece: Piece, part: Tensor) -> Tensor:
        high, low = part.amax(0), part.amin(0)
        return torch.where(high > -low, high, torch.where(high < -low, low, 0))

    return TaskVectors(ws, base).merge(strongest, scale)


@on_parameters()
def emr(ws: Sequence[Weights], *, base: Weights, task: checks.Index | None = None) -> dict[str, Tensor]:
    """The elected unified weights or, with `task` = i, those masked and rescaled for task i.

    Elect: at each entry the sign of the sum of task vectors (n, entries), and of the entries with it the largest
    magnitude: the unified vector u. Mask: task i takes u where it agrees in sign with its own vector tau_i. Rescale: by
    sum |tau_i| / sum |u masked|, over all weights. The paper deploys the masked weights, each task with a mask of one
    bit an entry and one number; None gives base + u, the one network that needs no task. Where the sum is zero nothing
    moves; released code elects a minus there, and its ratio is of sums of the tensors' means.

    Raises ValueError for a task that is not among the weights.

    Ref: Huang et al., EMR-Merging, arXiv 2405.17461.
    """
    vectors = TaskVectors(ws, base)
    if task is not None and task >= len(ws):
        raise ValueError(f"task: {task} is not one of 0 to {len(ws) - 1}; None gives the unified weights")

    def rule(piece: Piece, part: Tensor) -> Tensor:
        sign = part.sum(0).sign_()
        u = sign * (part * sign).amax(0).clamp_(min=0)
        return u if task is None else u * (u * part[task] > 0)

    own = kept = 0.0
    for piece, part in vectors if task is not None else ():
        own = own + part[task].abs().sum(dtype=torch.float64).cpu()
        kept = kept + rule(piece, part).abs().sum(dtype=torch.float64).cpu()
    return vectors.merge(rule, float(own / kept) if kept else 1.0)


@on_parameters()
def pcb(
    ws: Sequence[Weights], *, base: Weights, density: Density = 0.2, scale: Scale = 1.0, whole: bool = True
) -> dict[str, Tensor]:
    """`base` plus `scale` times the mean of the task vectors weighted, entry by entry, by how well each competes.

    Of N task vectors (N, entries), task i has, with norm(x) = (x - min x) / (max x - min x) and the softmax over
    entries, the scores

        b_i = softmax(N norm(tau_i tau_i))  *  sum_j softmax(norm(tau_i tau_j)),

    large where it moves far and others move along. The `density` entries with the largest b_i are kept. The result is
    sum_i b_i tau_i / sum_i b_i over the tasks that keep the entry. Minimum, maximum, softmax and density are over all
    weights as one vector, as in the paper, or tensor by tensor with `whole=False`. The paper keeps 20 % or less and
    tunes scale around 1. What norm is, it leaves open; this is the one of the released code, which differs in the rest.
    That clips the largest and the smallest magnitudes. It scores exp(N norm(|tau_i|)^2) tanh(tau_i sum_j tau_j), and
    weights by how far a score is above the lowest one kept.

    Raises ValueError where products of task vectors overflow.

    Ref: Du et al., Parameter competition balancing, arXiv 2410.02396, eq. 1 to 4.
    """
    vectors = TaskVectors(ws, base)
    scores: dict[str, _Scores] = {}
    for names in vectors.groups(whole):
        scores |= dict.fromkeys(names, _Scores(vectors, names))
    kept = largest(vectors, partial(count, density), whole, lambda piece, i: scores[piece.name](vectors.read(piece), i))

    def rule(piece: Piece, part: Tensor) -> Tensor:
        score = torch.stack([scores[piece.name](part, i) for i in range(len(ws))])
        score.masked_fill_(~kept(piece, score), -torch.inf)
        return (score.softmax(0).nan_to_num_(0.0) * part).sum(0)  # NaN where no task keeps the entry

    return vectors.merge(rule, scale)


class _Scores:
    """The logarithms of b_i of `pcb` for some tensors, up to one summand for all tasks.

    exp(N norm) itself leaves single precision from 89 tasks on.
    """

    def __init__(self, vectors: TaskVectors, names: Sequence[str]) -> None:
        n, entries = len(vectors), vectors.size(names)
        self.low = torch.full((n, n), torch.inf, dtype=torch.float64)
        self.high = -self.low
        for part in map(vectors.read, vectors.pieces(names)):
            for i in range(n):
                products = part[i] * part
                self.low[i] = torch.minimum(self.low[i], products.amin(1).cpu())
                self.high[i] = torch.maximum(self.high[i], products.amax(1).cpu())
        if entries and not (self.high - self.low).isfinite().all():
            raise ValueError(f"ws: products of task vectors overflow in {names[:3]}; give shorter ones")
        total, own = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        top = (self.high > self.low).diagonal().double()  # the largest norm(tau_i tau_i): 1, or 0 where all are equal
        for part in map(vectors.read, vectors.pieces(names)):
            for i in range(n):
                normed = self._normed(part, i)
                total[i] += normed.exp().sum(1, dtype=torch.float64).cpu()
                own[i] += (n * (normed[i] - float(top[i]))).exp().sum(dtype=torch.float64).cpu()
        self.total, self.own = total / max(entries, 1), own.log() + n * top

    def _normed(self, part: Tensor, i: int) -> Tensor:
        """norm(tau_i tau_j) for all j; 0 where all entries are equal."""
        width = self.high[i] - self.low[i]
        low, width = (x.to(part)[:, None] for x in (self.low[i], torch.where(width > 0, width, torch.inf)))
        return ((part[i] * part) - low) / width

    def __call__(self, part: Tensor, i: int) -> Tensor:
        """Those of task i (entries), there where the task vectors (n, entries) are `part`."""
        normed = self._normed(part, i)
        inter = (normed.exp() / self.total[i].to(part)[:, None]).sum(0)
        return len(part) * normed[i] - self.own[i].to(part) + inter.log()


def agreed(vectors: Tensor) -> Tensor:
    """Elects, at every entry of (n, entries), the sign of the sum and gives the mean of those that have it: (entries).

    0 where the sum is.
    """
    sign = vectors.sum(0).sign_()
    agree = (vectors * sign > 0).to(vectors.dtype)
    return (vectors * agree).sum(0).div_(agree.sum(0).clamp_(min=1))

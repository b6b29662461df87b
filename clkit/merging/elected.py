"""Merges in which tasks compete for each entry: the largest wins (MagMax), signs vote (EMR), or merit weights (PCB)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clkit.merging.pieces import Piece, TaskVectors
from clkit.merging.vectors import count, elect, finite, share, strongest, tops
from clkit.weights import Weights


def magmax(ws: Sequence[Weights], *, base: Weights, scale: float = 1.0) -> dict[str, Tensor]:
    """`base` plus `scale` times, at every entry, the entry of largest magnitude among the task vectors.

    The paper merges weights trained one task after the other and tunes the scale (0.5 is common); 1 gives a copy for
    copies. Where the largest entries of both signs tie, nothing moves, so that neither order nor sign matters; released
    code takes the last.

    Ref: Marczak et al., MagMax, arXiv 2407.06322.
    """
    scale = finite("scale", scale)
    return TaskVectors(ws, base).merge(lambda piece, part: strongest(part), scale)


def emr(ws: Sequence[Weights], *, base: Weights, task: int | None = None) -> dict[str, Tensor]:
    """The elected unified weights or, with `task` = i, those masked and rescaled for task i.

    Elect: at each entry the sign of the sum of task vectors, and of the entries with it the largest magnitude: the
    unified vector u. Mask: task i takes u where it agrees in sign with its own vector tau_i. Rescale: by
    sum |tau_i| / sum |u masked|, over all weights. The paper deploys the masked weights, each task with a mask of one
    bit an entry and one number; None gives base + u, the one network that needs no task. Where the sum is zero nothing
    moves; released code elects a minus there, and its ratio is of sums of the tensors' means.

    Ref: Huang et al., EMR-Merging, arXiv 2405.17461.
    """
    vectors = TaskVectors(ws, base)
    if task is not None and not 0 <= task < len(ws):
        raise ValueError(f"task: {task} is not one of 0 to {len(ws) - 1}; None gives the unified weights")

    def unified(part: Tensor) -> Tensor:
        sign = elect(part)
        return sign * (part * sign).amax(0).clamp_(min=0)

    if task is None:
        return vectors.merge(lambda piece, part: unified(part))

    def masked(part: Tensor) -> Tensor:
        u = unified(part)
        return u * (u * part[task] > 0)

    own = kept = 0.0
    for _, part in vectors:
        own = own + part[task].abs().sum(dtype=torch.float64).cpu()
        kept = kept + masked(part).abs().sum(dtype=torch.float64).cpu()
    return vectors.merge(lambda piece, part: masked(part), float(own / kept) if kept else 1.0)


def pcb(
    ws: Sequence[Weights], *, base: Weights, density: float = 0.2, scale: float = 1.0, whole: bool = True
) -> dict[str, Tensor]:
    """`base` plus `scale` times the mean of the task vectors weighted, entry by entry, by how well each competes.

    With N tasks, norm(x) = (x - min x) / (max x - min x) and the softmax over entries, task i has the scores

        b_i = softmax(N norm(tau_i tau_i))  *  sum_j softmax(norm(tau_i tau_j)),

    large where it moves far and others move along. The `density` entries with the largest b_i are kept, and the result
    is sum_i b_i tau_i / sum_i b_i over the tasks that keep the entry. Minimum, maximum, softmax and density are over
    all weights as one vector, as in the paper, or tensor by tensor with `whole=False`. The paper keeps 20 % or less and
    tunes scale around 1. What norm is, it leaves open; this is the one of the released code, which differs in the rest:
    it clips the largest and the smallest magnitudes, scores exp(N norm(|tau_i|)^2) tanh(tau_i sum_j tau_j), and weights
    by how far a score is above the lowest one kept.

    Ref: Du et al., Parameter competition balancing, arXiv 2410.02396, eq. 1 to 4.
    """
    density, scale = share("density", density), finite("scale", scale)
    vectors = TaskVectors(ws, base)
    scores: dict[str, _Scores] = {}
    for names in [vectors.names] if whole else [(name,) for name in vectors.names]:
        scores |= dict.fromkeys(names, _Scores(vectors, names))
    top = (
        tops(vectors, lambda n: (count(density, n),), whole, lambda piece, part: scores[piece.name](part))
        if density < 1
        else None
    )

    def rule(piece: Piece, part: Tensor) -> Tensor:
        score = scores[piece.name](part)
        if top:
            score = score.masked_fill(~top[piece.name][0](score), -torch.inf)
        return (score.softmax(0).nan_to_num_(0.0) * part).sum(0)  # NaN where no task keeps the entry

    return vectors.merge(rule, scale)


class _Scores:
    """The logarithms of b_i of `pcb` for some tensors, up to one summand for all tasks.

    exp(N norm) itself leaves single precision from 89 tasks on.
    """

    def __init__(self, vectors: TaskVectors, names: Sequence[str]) -> None:
        n = len(vectors)
        self.low = torch.full((n, n), torch.inf, dtype=torch.float64)
        self.high, self.entries = -self.low, sum(vectors.base[name].numel() for name in names)
        for _, part in vectors.of(names):
            for i in range(n):
                products = part[i] * part
                self.low[i] = torch.minimum(self.low[i], products.amin(1).cpu())
                self.high[i] = torch.maximum(self.high[i], products.amax(1).cpu())
        if self.entries and not (self.high - self.low).isfinite().all():
            raise ValueError(f"ws: products of task vectors overflow in {names[:3]}; give shorter ones")
        total, own = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        top = (self.high > self.low).diagonal().double()  # the largest norm(tau_i tau_i): 1, or 0 where all are equal
        for _, part in vectors.of(names):
            for i in range(n):
                normed = self._normed(part, i)
                total[i] += normed.exp().sum(1, dtype=torch.float64).cpu()
                own[i] += (n * (normed[i] - float(top[i]))).exp().sum(dtype=torch.float64).cpu()
        self.total, self.own = total / max(self.entries, 1), own.log() + n * top

    def _normed(self, part: Tensor, i: int) -> Tensor:
        """norm(tau_i tau_j) for all j; 0 where all entries are equal."""
        width = self.high[i] - self.low[i]
        low, width = (x.to(part)[:, None] for x in (self.low[i], torch.where(width > 0, width, torch.inf)))
        return ((part[i] * part) - low) / width

    def __call__(self, part: Tensor) -> Tensor:
        """The logarithms there (n, entries)."""
        n = len(part)
        found = torch.empty_like(part)
        for i in range(n):
            normed = self._normed(part, i)
            inter = (normed.exp() / self.total[i].to(part)[:, None]).sum(0)
            found[i] = n * normed[i] - self.own[i].to(part) + inter.log()
        return found

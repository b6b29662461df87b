"""The vocabulary of sparse merges on task vectors (n, entries): trim, drop, elect, and the mean of those that agree."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clkit.merging.pieces import Piece, TaskVectors

DIRECT = 2**18  # so many values of a task are selected from at once; of more, a sample brackets the threshold first
SAMPLE = 2**16
Quantity = Callable[[Piece, Tensor], Tensor]


def magnitude(piece: Piece, vectors: Tensor) -> Tensor:
    """How large each entry is: what most methods rank by."""
    return vectors.abs()


def count(density: float, size: int) -> int:
    """How many of `size` entries a density keeps: density x size, rounded up, so that no tensor is emptied."""
    return min(size, math.ceil(round(density * size, 6)))


def share(name: str, value: float, *, low: float = 0.0, open_low: bool = True) -> float:
    """The value, if it is a share in (0, 1], or in [0, 1] where `open_low` is False."""
    if not (low < value <= 1 or (value == low and not open_low)):
        raise ValueError(f"{name}: {value} is outside {'(' if open_low else '['}{low:g}, 1]; give the share of entries")
    return float(value)


def finite(name: str, value: float) -> float:
    """The value, if it is finite."""
    if not math.isfinite(value):
        raise ValueError(f"{name}: {value} is not finite; use 1, 1 / n, or tune it on held-out data")
    return float(value)


class Top:
    """The mask of the `keep` largest values of each task, given piece by piece in order: exactly so many.

    Of values that tie with the smallest one kept, the first in order are kept.
    """

    def __init__(self, value: Tensor, quota: Tensor, tied: Tensor) -> None:
        self.value, self.quota, self.seen = value.unsqueeze(1), quota.unsqueeze(1), torch.zeros_like(quota).unsqueeze(1)
        self.ties = not torch.equal(quota, tied)

    def __call__(self, values: Tensor) -> Tensor:
        """Which of the next values (n, entries) belong to the largest."""
        threshold = self.value.to(values.device)
        if not self.ties:
            return values >= threshold
        equal = values == threshold
        order = equal.cumsum(1) + self.seen.to(values.device)
        self.seen = order[:, -1:] if values.shape[1] else self.seen
        return (values > threshold) | (equal & (order <= self.quota.to(values.device)))


def tops(
    vectors: TaskVectors, counts: Callable[[int], tuple[int, ...]], whole: bool, of: Quantity = magnitude
) -> Mapping[str, tuple[Top, ...]]:
    """For every tensor's name, masks of the largest values, as many as `counts` says; those of all if `whole`.

    The masks are good for one reading of all task vectors.
    """
    if whole:
        found = tuple(_top(vectors, vectors.names, keep, of) for keep in counts(vectors.size))
        return dict.fromkeys(vectors.names, found)
    sizes = {name: vectors.base[name].numel() for name in vectors.names}
    return {name: tuple(_top(vectors, (name,), keep, of) for keep in counts(size)) for name, size in sizes.items()}


class _Store:
    """Growing rows of values in one tensor; many small ones would leave the memory of freed pieces in holes."""

    def __init__(self, rows: int, capacity: int, dtype: torch.dtype) -> None:
        self.values, self.filled = torch.empty(rows, capacity, dtype=dtype), [0] * rows

    def put(self, row: int, values: Tensor) -> None:
        """Appends values to a row."""
        start = self.filled[row]
        self.filled[row] = stop = start + len(values)
        while stop > self.values.shape[1]:
            self.values = torch.cat([self.values, torch.empty_like(self.values)], 1)
        self.values[row, start:stop] = values

    def of(self, row: int) -> Tensor:
        """What a row holds."""
        return self.values[row, : self.filled[row]]


def _top(vectors: TaskVectors, names: tuple[str, ...], keep: int, of: Quantity) -> Top:
    """Finds each task's smallest value kept, without sorting and without a second copy of the values.

    A strided sample brackets the threshold; one reading counts what is above the bracket and collects what is in it, a
    few per cent, from which the threshold is selected exactly. A bracket that missed is opened on that side.
    """
    n, size = len(vectors), sum(vectors.base[name].numel() for name in names)
    if not 0 < keep < size:
        value = torch.full((n,), math.inf if keep == 0 else -math.inf, dtype=vectors.dtype)
        return Top(value, torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long))
    stride = 1 if size <= DIRECT else -(-size // SAMPLE)
    low, high = torch.full((2, n, 1), -math.inf, dtype=vectors.dtype)
    high = -low
    if stride > 1:
        seen = _Store(n, min(size, 2 * SAMPLE), vectors.dtype)
        for piece in vectors.pieces(names):
            for i, row in enumerate(of(piece, vectors.read(piece, stride))):
                seen.put(i, row)
        sample = torch.stack([seen.of(i) for i in range(n)]).sort(1, descending=True).values
        rank, m = keep / size * sample.shape[1], sample.shape[1]
        slack = 4 * math.sqrt(m * keep / size * (1 - keep / size)) + 4
        if rank - slack >= 0:
            high = sample[:, int(rank - slack), None]
        if rank + slack < m:
            low = sample[:, int(rank + slack), None]
    while True:
        above, inside = torch.zeros(n, dtype=torch.long), _Store(n, min(size, 2 * SAMPLE), vectors.dtype)
        for piece, part in vectors.of(names):
            values = of(piece, part)
            over = values > high.to(values.device)
            within = (values >= low.to(values.device)) & ~over
            above += over.sum(1).cpu()
            for i, chosen in enumerate(within):
                inside.put(i, values[i][chosen])
        candidates = [inside.of(i) for i in range(n)]
        within_counts = torch.tensor([len(c) for c in candidates])
        missed_high, missed_low = above >= keep, above + within_counts < keep
        if not (missed_high | missed_low).any():
            break
        if (low[missed_low] == -math.inf).any():  # no bracket is wider: some values are NaN
            raise ValueError(f"ws: what entries of {names[:3]} are ranked by is not a number; give task vectors that "
                             "do not overflow")  # fmt: skip
        high[missed_high], low[missed_low] = math.inf, -math.inf
    value, quota, tied = (
        torch.empty(n, dtype=vectors.dtype),
        torch.empty(n, dtype=torch.long),
        torch.empty(n, dtype=torch.long),
    )
    for i, c in enumerate(candidates):
        rank = keep - int(above[i])
        value[i] = c.kthvalue(len(c) - rank + 1).values
        quota[i], tied[i] = rank - (c > value[i]).sum(), (c == value[i]).sum()
    return Top(value, quota, tied)


class Draws:
    """Uniform numbers in [0, 1) for the entries of each task, in order, on the CPU: all devices draw the same.

    Each task has a stream of its own, so its mask does not depend on how many others there are.
    """

    def __init__(self, seed: int, tasks: int) -> None:
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed: {seed!r}; give an integer from 0 to 2**63 - 1")
        seeds = torch.randint(2**62, (tasks,), generator=torch.Generator().manual_seed(seed))
        self.generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

    def below(self, probability: Tensor | float, entries: int) -> Tensor:
        """For the next entries of each task, whether the number drawn lies below the probability: (n, entries)."""
        drawn = torch.stack([torch.rand(entries, generator=g) for g in self.generators])
        return drawn < (probability.cpu() if isinstance(probability, Tensor) else probability)


def elect(vectors: Tensor) -> Tensor:
    """The sign of the sum over tasks at every entry; 0 where they cancel."""
    return vectors.sum(0).sign_()


def disjoint_mean(vectors: Tensor, sign: Tensor) -> Tensor:
    """At every entry the mean over the tasks whose entry has this sign; 0 where there is none, or where it is 0."""
    agree = (vectors * sign > 0).to(vectors.dtype)
    return (vectors * agree).sum(0).div_(agree.sum(0).clamp_(min=1))


def agreed(vectors: Tensor) -> Tensor:
    """Elect, then the mean of those that agree: how TIES merges what is left after trimming."""
    return disjoint_mean(vectors, elect(vectors))


def strongest(vectors: Tensor) -> Tensor:
    """At every entry the value of the largest magnitude; 0 where the largest of both signs tie."""
    high, low = vectors.amax(0), vectors.amin(0)
    return torch.where(high > -low, high, torch.where(high < -low, low, 0))

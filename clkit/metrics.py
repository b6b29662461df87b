"""What an accuracy matrix says: average accuracy, forgetting, transfer, plasticity; and the barrier of a curve.

`matrix[t, k]` is the test accuracy on task k, in [0, 1], of the weights that are deployed after task t, which a
consolidation may have mixed. T tasks make it (T, T), and another shape raises ValueError. Every measure of such a
matrix stands here, once. None reads an entry with k > t + 1: these may be NaN, not measured, as in a run that went on
with more tasks. Published tables that divide the sum of forgetting by T instead of T - 1 (CLeWI's does) are
`forgetting * (T - 1) / T`.
"""

import numpy as np
from numpy.typing import ArrayLike

from clkit import checks


def _square(matrix: ArrayLike) -> np.ndarray:
    with checks.explained(f"matrix: {matrix!r:.80} holds no numbers", "give accuracies, tasks by tasks"):
        a = np.asarray(matrix, dtype=float)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not len(a):
        raise ValueError(f"matrix: the shape is {a.shape}; pass (tasks, tasks), row t after learning task t")
    return a


def acc(matrix: ArrayLike) -> float:
    """Average accuracy over all tasks after the last one: mean_k A[T-1, k]."""
    return float(_square(matrix)[-1].mean())


def last(matrix: ArrayLike) -> float:
    """Accuracy on the newest task after learning it last: A[T-1, T-1]."""
    return float(_square(matrix)[-1, -1])


def forgetting(matrix: ArrayLike) -> float:
    """Mean drop of every earlier task from its best to its final accuracy: mean_{k<T-1} (max_{t>=k} A[t,k] - A[T-1,k]).

    0 for one task. The maximum includes the last row, so the value is never negative.
    """
    a = _square(matrix)
    drops = [a[k:, k].max() - a[-1, k] for k in range(len(a) - 1)]
    return float(np.mean(drops)) if drops else 0.0


def bwt(matrix: ArrayLike) -> float:
    """Backward transfer: mean_{k<T-1} (A[T-1,k] - A[k,k]); negative when later tasks hurt earlier ones."""
    a = _square(matrix)
    return float((a[-1, :-1] - np.diag(a)[:-1]).mean()) if len(a) > 1 else 0.0


def fwt(matrix: ArrayLike, initial: ArrayLike) -> float:
    """Forward transfer: mean_{k>0} (A[k-1,k] - initial[k]), `initial` (T,) being the accuracies before any training.

    Raises ValueError unless `initial` has one accuracy for each task.
    """
    a, start = _square(matrix), np.asarray(initial, dtype=float)
    if start.shape != (len(a),):
        raise ValueError(f"initial: the shape is {start.shape}; pass one accuracy for each of {len(a)} tasks")
    return float((np.diag(a, 1) - start[1:]).mean()) if len(a) > 1 else 0.0


def plasticity(matrix: ArrayLike) -> float:
    """How well a task is known right after it was learned: mean_t A[t, t]."""
    return float(np.diag(_square(matrix)).mean())


def running(matrix: ArrayLike) -> np.ndarray:
    """Average accuracy over the tasks seen so far, after each task: mean_{k<=t} A[t, k] for every t."""
    a = _square(matrix)
    return np.array([a[t, : t + 1].mean() for t in range(len(a))])


def summary(matrix: ArrayLike, initial: ArrayLike) -> dict[str, float]:
    """All single numbers of the above by name: acc, forgetting, bwt, fwt, last, plasticity."""
    return {
        "acc": acc(matrix),
        "forgetting": forgetting(matrix),
        "bwt": bwt(matrix),
        "fwt": fwt(matrix, initial),
        "last": last(matrix),
        "plasticity": plasticity(matrix),
    }


def barrier(losses: ArrayLike, ts: ArrayLike) -> float:
    """The highest a loss curve rises over the chord of its end points: max_t L(t) - ((1-t) L(0) + t L(1)).

    `losses` (n,) are measured at `ts` (n,), which rise from 0 to 1; else raises ValueError. The end points themselves
    give 0, so the value is never negative.
    """
    curve, t = np.asarray(losses, dtype=float), np.asarray(ts, dtype=float)
    if curve.shape != t.shape or t.ndim != 1 or len(t) < 2 or t[0] != 0 or t[-1] != 1 or (np.diff(t) <= 0).any():
        raise ValueError(f"ts: {t} for {curve.shape} losses; pass rising positions from 0 to 1, one for each loss")
    return float((curve - ((1 - t) * curve[0] + t * curve[-1])).max())

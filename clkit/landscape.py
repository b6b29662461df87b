"""Loss and accuracy along paths through weight space, and over planes in it.

A path is any function from t to weights. Curves are measured on the test data of a stream's tasks, on the device of
the model, with one scratch copy of it.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from clkit import alignment, checks, metrics, normalization, weights
from clkit.data import Stream, Task
from clkit.evaluation import EVALUATION_BATCH, evaluate, outputs
from clkit.merging import task_arithmetic
from clkit.weights import Weights

Variant = Literal["plain", "plain, re-estimated", "aligned", "aligned, re-estimated"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

Path = Callable[[float], Weights]
Predict = Callable[[nn.Module, Tensor, Task | None], Tensor]


@dataclass(frozen=True, eq=False)
class Curve:
    """What was measured at the positions `ts` (points,) of a path: `loss` and `accuracy` (points, tasks), in [0, 1]."""

    ts: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray

    @property
    def barrier(self) -> float:
        """How far the mean loss over tasks rises above the chord of the two ends; needs t = 0 and t = 1."""
        return metrics.barrier(self.loss.mean(1), self.ts)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table with the columns t, task, loss, accuracy."""

        points, tasks = self.loss.shape
        columns = {"t": np.repeat(self.ts, tasks), "task": np.tile(np.arange(tasks), points)}
        return pd.DataFrame(columns | {"loss": self.loss.ravel(), "accuracy": self.accuracy.ravel()})


def segment(a: Weights, b: Weights) -> Path:
    """The straight path from `a` (t = 0) to `b` (t = 1); beyond its ends running statistics stay those of the end."""
    weights.check_same(a, b)
    old, new = weights.statistics(a), weights.statistics(b)

    def at(t: float) -> dict[str, Tensor]:
        point = weights.lerp(a, b, t)
        return point if 0 <= t <= 1 else point | weights.lerp(old, new, float(t > 1))

    return at


@checks.arguments
def curve(
    model: nn.Module,
    path: Path | tuple[Weights, Weights],
    stream: Stream,
    ts: int | ArrayLike = 21,
    *,
    refresh: Tensor | None = None,
    seen: checks.Count | None = None,
    predict: Predict | None = None,
    batch: checks.Count = EVALUATION_BATCH,
) -> Curve:
    """Loss and test accuracy on each task of `stream` along `path`, or along the segment from a to b for `path=(a, b)`.

    `ts` are positions, or how many of them evenly from 0 to 1. `refresh` are prepared inputs on which BatchNorm's
    statistics are re-estimated at every position, ends included; None takes them as the path gives them. `seen` keeps
    the first so many tasks only. `predict` is a learner's, as for `evaluation.evaluate`. The model is not changed.
    Waits for the device once a position. Raises ValueError for no positions and for more tasks than there are.
    """
    positions = _positions(ts)
    measure = _measure(model, stream, seen, refresh, predict, batch)
    if isinstance(path, tuple):
        a, b = (_on(next(model.parameters()).device, end) for end in path)
        path = segment(a, b)
    rows = [measure(path(float(t))) for t in positions]
    loss, accuracy = (np.stack(column) for column in zip(*rows, strict=True))
    return Curve(positions, loss, accuracy)


@checks.arguments
def interpolation(
    model: nn.Module,
    old: Weights,
    new: Weights,
    stream: Stream,
    inputs: Tensor,
    *,
    ts: int | ArrayLike = 21,
    symmetry: alignment.Symmetry | None = None,
    seen: checks.Count | None = None,
    variants: tuple[Variant, ...] = VARIANTS,
) -> dict[str, Curve]:
    """The four curves from `new` (t = 0) to `old` (t = 1) that show what alignment and re-estimation each do.

    "plain" and "aligned" (`old` permuted to look like `new` by activations on `inputs`) take BatchNorm's statistics
    as interpolated; "plain, re-estimated" and "aligned, re-estimated" estimate them on `inputs` at every position, as
    CLeWI does (arXiv 2404.04002), whose alpha is this t. `variants` picks some of them. `inputs` (N, ...) are prepared.
    `symmetry` saves deriving it from the model again. Raises ValueError as `curve` does.
    """
    device = next(model.parameters()).device
    old, new, inputs = _on(device, old), _on(device, new), inputs.to(device)
    ends = {"plain": old}
    if any(name.startswith("aligned") for name in variants):
        symmetry = symmetry or alignment.symmetry(model, inputs[:2])
        match = alignment.align(symmetry, model, new, old, inputs, by="activations")
        ends["aligned"] = alignment.permute(symmetry, match.permutations, old)
    return {
        name: curve(
            model,
            (new, ends[name.partition(",")[0]]),
            stream,
            ts,
            seen=seen,
            refresh=inputs if name.endswith("re-estimated") else None,
        )
        for name in variants
    }


@checks.arguments
def merges(
    model: nn.Module,
    trained: Sequence[Weights],
    deployed: Sequence[Weights],
    inputs: Sequence[Tensor],
    stream: Stream,
    *,
    ts: int | ArrayLike = 21,
    variants: tuple[Variant, ...] = VARIANTS,
) -> list[dict[str, Curve]]:
    """The curves of `interpolation` for every merge of a stream, over the tasks seen by then: entry 0 is after task 1.

    Each path goes from the weights `trained` on a task to those `deployed` after the task before it. A run's result
    keeps both, and the `inputs` (N, ...) that its consolidation saw. Whatever alpha the run merged with, the whole path
    is shown.
    """
    symmetry = alignment.symmetry(model, inputs[0][:2].to(next(model.parameters()).device))
    options = {"ts": ts, "symmetry": symmetry, "variants": variants}
    return [
        interpolation(model, deployed[t - 1], trained[t], stream, inputs[t], seen=t + 1, **options)
        for t in range(1, len(trained))
    ]


@checks.arguments
def disentanglement(
    model: nn.Module, base: Weights, trained: Sequence[Weights], stream: Stream, alpha: float = 1.0
) -> np.ndarray:
    """How often another task's vector changes a task's predictions: (T, T), shares of its test data.

    Entry [i, j], NaN where i = j, compares base + alpha tau_i with base + alpha (tau_i + tau_j) on task i, by the
    largest logit among its classes; tau_k leads from `base` to trained[k]. At 0 weights are disentangled. A pair's
    disentanglement error xi(alpha, alpha) is [i, j] + [j, i] (Ortiz-Jimenez et al. 2023, arXiv 2305.12827, section 4).
    The model is not changed. Raises ValueError unless there are weights for every task.
    """
    if len(trained) != len(stream):
        raise ValueError(f"trained: {len(trained)} weights for {len(stream)} tasks; give those trained on each")
    base, *ends = (_on(next(model.parameters()).device, w) for w in (base, *trained))
    found = np.full((len(ends), len(ends)), np.nan)
    for i, task in enumerate(stream.to(next(model.parameters()).device)):
        x, own = task.prepare(task.test.x), list(task.classes)
        sums = [ends[i : i + 1], *([ends[i], end] for end in ends)]
        points = (task_arithmetic(ws, base=base, scale=alpha) for ws in sums)
        alone, *both = (outputs(model, point, x)[..., own].argmax(-1) for point in points)
        found[i] = [np.nan if i == j else float((b != alone).double().mean()) for j, b in enumerate(both)]
    return found


@dataclass(frozen=True, eq=False)
class Plane:
    """Mean loss and accuracy over tasks on a grid, [row, column] at (`ys`[row], `xs`[column]); `corners` (3, 2)."""

    xs: np.ndarray
    ys: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    corners: np.ndarray


@checks.arguments
def plane(
    model: nn.Module,
    corners: Sequence[Weights],
    stream: Stream,
    points: checks.Count = 15,
    *,
    margin: float = 0.25,
    refresh: Tensor | None = None,
    seen: checks.Count | None = None,
    predict: Predict | None = None,
    batch: checks.Count = EVALUATION_BATCH,
) -> Plane:
    """Loss and accuracy on the plane through three weights (a, b, c), `points` by `points`, in true proportions.

    a is the origin, b lies on the x axis; distances are those of parameters. The grid reaches `margin` times its extent
    beyond the corners (Garipov et al., arXiv 1802.10026, figure 1). Running statistics are averaged: a corner weighs as
    much as it makes up of the point, and nothing where the point lies beyond the other two. Points are measured one
    after the other: beside the corners and the test data, memory is that of seven networks, however many there are.
    Other options as for `curve`. Raises ValueError unless there are three corners that do not lie on one line.
    """
    if len(corners) != 3:
        raise ValueError(f"corners: {len(corners)} weights were given; a plane goes through three")
    measure = _measure(model, stream, seen, refresh, predict, batch)
    corners = [_on(next(model.parameters()).device, corner) for corner in corners]
    running = [weights.statistics(corner) for corner in corners]
    a, b, c = ({name: t for name, t in corner.items() if not weights.is_statistic(name)} for corner in corners)
    to_b, to_c = weights.sub(b, a), weights.sub(c, a)
    width = weights.norm(to_b)
    along = weights.dot(to_b, to_c) / width if width else 0.0
    aside = weights.sub(to_c, weights.scale(to_b, along / width)) if width else to_c
    height = weights.norm(aside)
    if not height > 1e-6 * width > 0:
        raise ValueError("corners: the three weights lie on one line; a plane needs three that do not")
    flat = np.array([[0, 0], [width, 0], [along, height]])
    low, high = flat.min(0), flat.max(0)
    xs, ys = np.linspace(low - margin * (high - low), high + margin * (high - low), points, axis=1)
    loss, accuracy = np.empty((points, points)), np.empty((points, points))
    for i, j in np.ndindex(points, points):
        x, y = xs[j] / width, ys[i] / height
        part_b = x - y * along / width
        parts = np.clip([1 - part_b - y, part_b, y], 0, None)
        spot = weights.combine([a, to_b, aside], [1.0, x, y]) | weights.combine(running, (parts / parts.sum()).tolist())
        losses, accuracies = measure(spot)
        loss[i, j], accuracy[i, j] = losses.mean(), accuracies.mean()
    return Plane(xs, ys, loss, accuracy, flat)


def to_frame(curves: Mapping[str, Curve]) -> pd.DataFrame:
    """Named curves as one tidy table with the columns variant, t, task, loss, accuracy."""

    tables = [curve.to_frame() for curve in curves.values()]
    return pd.concat(tables, keys=list(curves), names=["variant"]).reset_index("variant").reset_index(drop=True)


def _measure(
    model: nn.Module, stream: Stream, seen: int | None, refresh: Tensor | None, predict: Predict | None, batch: int
) -> Callable[[Weights], tuple[np.ndarray, np.ndarray]]:
    """A function that gives loss and accuracy (tasks,) of weights, as `curve` measures them, in one scratch copy."""
    if (seen or 0) > len(stream):
        raise ValueError(f"seen: {seen} of {len(stream)} tasks; give a number from 1 to {len(stream)}")
    device, scratch = next(model.parameters()).device, copy.deepcopy(model)
    stream = replace(stream, tasks=stream.tasks[:seen]).to(device)

    def measure(at: Weights) -> tuple[np.ndarray, np.ndarray]:
        if refresh is not None:
            at = normalization.refresh(scratch, _on(device, at), refresh.to(device))
        weights.set_weights(scratch, at)
        found = evaluate(scratch, stream, predict=predict, batch=batch)
        return found.loss, found.accuracy

    return measure


def _positions(ts: int | ArrayLike) -> np.ndarray:
    if isinstance(ts, int):
        if ts < 2:
            raise ValueError(f"ts: {ts} positions are too few for a curve; give 2 or more, 21 is usual")
        return np.linspace(0, 1, ts)
    with checks.explained(f"ts: {ts!r:.80} are not positions", "give a number of them or a list such as [0, 0.5, 1]"):
        positions = np.asarray(ts, dtype=float)
    if positions.ndim != 1 or not len(positions) or not np.isfinite(positions).all():
        raise ValueError(f"ts: {ts} are not positions; give a number of them or a list such as [0, 0.5, 1]")
    return positions


def _on(device: torch.device, w: Weights) -> Weights:
    return {name: tensor.to(device) for name, tensor in w.items()}

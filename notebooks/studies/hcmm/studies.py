"""HCMM's studies that are no grids: the path between two tasks, what a merge does to features, and what is kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from clkit import landscape, representation
from clkit.consolidation import HCMM, Consolidation, Context, Merged, Merging, Progress, correct, importance_merge
from clkit.data import Stream
from clkit.experiments import Comparison, accuracies
from clkit.experiments.statistics import AXES, paired_difference
from clkit.training import Result, run
from clkit.weights import Weights, get_weights, set_weights
from studies.hcmm.grids import LINEAR, MODES, TRAINING
from studies.hcmm.settings import glyphs, model

if TYPE_CHECKING:
    import pandas as pd

BASELINES = ("TIES, sequential", "MagMax, sequential", "average, sequential", "EWC", "LwF")
CORRECTIONS: dict[str, dict[str, Any]] = {
    "released": {"lr": 1e-7},
    "ten steps": {"lr": 1e-4},
    "ridge 1000": {"by": "ridge", "strength": 1000.0},
    "ridge 100": {"by": "ridge", "strength": 100.0},
    "ridge 10": {"by": "ridge", "strength": 10.0},
    "ridge 1": {"by": "ridge", "strength": 1.0},
    "ridge 1, both": {"by": "ridge", "strength": 1.0},
}
"""Settings of `correct`; "both" takes the features of both parents in equal shares as its target."""


class Remembering:
    """A consolidation as it is, of which the memo after every task is kept, by the task's number."""

    def __init__(self, inner: Consolidation) -> None:
        self.inner = inner
        self.memos: dict[int, Any] = {}
        for need in ("holdout", "uses_history", "uses_moments"):
            setattr(self, need, getattr(inner, need, False))

    def due(self, progress: Progress) -> bool:
        """When the consolidation is."""
        return self.inner.due(progress)

    def __call__(self, context: Context) -> Merged:
        """What the consolidation does."""
        merged = self.inner(context)
        self.memos[context.progress.task] = merged.memo
        return merged


def courses(grid: Comparison, **options: Any) -> "pd.DataFrame":
    """The runs of a grid, with what they read of all classes: "zero_shot", before any task, and "course", after each.

    Both are means over all tasks, those still to come among them; `options` are those of `Comparison.run`.
    """
    table = grid.run(**options)
    means = accuracies(table).groupby([*AXES, "after_task"], sort=False).accuracy.mean().unstack()
    rows = means.loc[list(table[list(AXES)].itertuples(index=False, name=None))].sort_index(axis=1)
    return table.assign(zero_shot=rows.pop(-1).to_numpy(), course=rows.to_numpy().tolist())


def steps(table: "pd.DataFrame", value: str = "acc") -> "pd.DataFrame":
    """What each stage adds to a table of `grids.table`, and HCMM to each baseline, paired by seed, Student's interval.

    Columns: step ("importance, tangent", "tangent space, linear", "HCMM over EWC", ...), gain, lower, upper, verdict.
    """
    import pandas as pd

    ends = {"no merge": "", "linear": " + linear", "importance": " + importance"}
    full = "tangent + importance + correction"
    pairs = {f"merging, {m}": (f"{m} + linear", m) for m in MODES}
    pairs |= {f"importance, {m}": (f"{m} + importance", f"{m} + linear") for m in MODES}
    pairs |= {f"correction, {m}": (f"{m} + importance + correction", f"{m} + importance") for m in MODES}
    pairs |= {f"tangent space, {name}": (f"tangent{end}", f"ordinary{end}") for name, end in ends.items()}
    pairs |= {f"HCMM over {name}": (full, name) for name in BASELINES}
    found = {step: paired_difference(table, *pair, value) for step, pair in pairs.items()}
    return pd.DataFrame(
        {"step": step, "gain": d.mean, "lower": d.lower, "upper": d.upper, "verdict": d.verdict}
        for step, d in found.items()
    )


def two_tasks(mode: str, lr: float, *, epochs: int = 15, seed: int = 0) -> tuple[Stream, Result, list[Weights]]:
    """Two tasks of ten characters learned one after the other: the stream, the run, and both tasks' importances.

    The weights after each task are the run's; importances are Adam's second moments, corrected for their bias.
    """
    stream = glyphs(seed, 2, 20)
    keep = Remembering(HCMM(alpha=1.0, correction="none"))
    net = model(stream, "glyphs", MODES[mode], seed=seed)
    training = replace(TRAINING, lr=lr, epochs=epochs)
    return (
        stream,
        run(stream, net, None, keep, training, seed=seed, device="cpu", progress=False),
        list(keep.memos.values()),
    )


def along(
    stream: Stream, result: Result, importances: Sequence[Weights], points: int = 21
) -> dict[str, landscape.Curve]:
    """Test loss and accuracy from the first task's weights (alpha = 0) to the second's, by a line and by importance."""
    first, second = result.weights
    before, after = importances
    paths = {
        "linear": landscape.segment(first, second),
        "importance": lambda alpha: importance_merge(first, second, before, after, alpha),
    }
    return {name: landscape.curve(result.model, path, stream, points) for name, path in paths.items()}


def paths(lrs: Sequence[float] = (1e-3, 1e-2), seeds: Sequence[int] = range(5)) -> "pd.DataFrame":
    """The curves of `along`, ordinary and tangent, at several learning rates: the paper's figures 1, 2 and 4.

    Columns: lr, seed, mode, merge, alpha, loss and accuracy (means over both tasks), barrier (of the whole curve: how
    far its loss rises above the chord, at most), gap (how far above it is on average; below 0 where it sags).
    """
    import pandas as pd

    rows = []
    for lr in lrs:
        for mode in MODES:
            for seed in seeds:
                for merge, curve in along(*two_tasks(mode, lr, seed=seed)).items():
                    loss = curve.loss.mean(1)
                    gap = float((loss - np.interp(curve.ts, [0, 1], loss[[0, -1]])).mean())
                    facts = {"lr": lr, "seed": seed, "mode": mode, "merge": merge, "barrier": curve.barrier, "gap": gap}
                    values = zip(curve.ts, loss, curve.accuracy.mean(1), strict=True)
                    rows += [facts | {"alpha": float(t), "loss": float(l), "accuracy": float(a)} for t, l, a in values]
    return pd.DataFrame(rows)


def corrected(
    mode: str = "tangent", lr: float = 1e-3, *, alpha: float = 0.5, tasks: int = 20, every: int = 1, seed: int = 0
) -> Iterator[tuple[int, Stream, nn.Module, dict[str, Weights]]]:
    """Merges of a run on the glyphs, as they are and with each of `CORRECTIONS`, none of which the run goes on with.

    One in `every` is taken. Yields the task just learned (from 1 on), the stream, a scratch model, and weights by name:
    "previous", "trained", "merged", and the corrections.
    """
    stream = glyphs(seed, tasks)
    net, rule = model(stream, "glyphs", MODES[mode], seed=seed), HCMM(alpha=alpha, correction="none")
    result = run(stream, net, None, rule, replace(TRAINING, lr=lr), seed=seed, device="cpu", progress=False)
    scratch = deepcopy(result.model)
    for t in range(1, len(stream), every):
        previous, trained, merged = result.weights[t - 1], result.trained[t], result.weights[t]
        found = {"previous": previous, "trained": trained, "merged": merged}
        for name, options in CORRECTIONS.items():
            parents = [(0.5, previous), (0.5, trained)] if "both" in name else [(1.0, previous)]
            found[name] = correct(scratch, merged, parents, result.inputs[t], **options)[0]
        yield t, stream, scratch, found


def mismatches(
    modes: Sequence[str] = tuple(MODES), lr: float = 1e-3, *, every: int = 3, seeds: Sequence[int] = range(5)
) -> "pd.DataFrame":
    """How far features are from those before the task, trained, merged and corrected: the paper's figure 3.

    On test images of the task just learned ("this task") and of all before it ("earlier tasks"). Columns: mode, seed,
    weights, on, l1, l2, cosine, cka (linear, unbiased), and accuracy (all classes compete); means over a run's merges.
    """
    import pandas as pd

    rows = []
    for mode in modes:
        for seed in seeds:
            for t, stream, scratch, found in corrected(mode, lr, every=every, seed=seed):
                for on, shown in {"this task": [stream[t]], "earlier tasks": stream.tasks[:t]}.items():
                    x = torch.cat([task.prepare(task.test.x) for task in shown])
                    y = torch.cat([task.test.y for task in shown])
                    facts = {"mode": mode, "seed": seed, "on": on}
                    rows += [facts | row for row in compared(scratch, found, x, y)]
    return pd.DataFrame(
        pd.DataFrame(rows).groupby(["mode", "seed", "weights", "on"], sort=False, as_index=False).mean()
    )


def compared(scratch: nn.Module, found: Mapping[str, Weights], x: Tensor, y: Tensor) -> Iterator[dict[str, Any]]:
    """What each of the weights makes of prepared images: mismatch and CKA with the first one's features, accuracy."""
    before: Tensor | None = None
    for name, weights in found.items():
        set_weights(scratch, weights)
        features = representation.features(scratch, x)
        before = features if before is None else before
        far = representation.mismatch(features, before).iloc[0][["l1", "l2", "cosine"]].to_dict()
        alike = representation.cka(features, before, unbiased=True)
        with torch.no_grad():
            right = scratch.get_submodule("head")(features).argmax(1) == y
        yield {"weights": name, **far, "cka": alike, "accuracy": float(right.double().mean())}


def kept(tasks: Sequence[int] = (2, 5, 10, 20), rules: Mapping[str, Consolidation] | None = None) -> "pd.DataFrame":
    """Bytes that a consolidation needs from one task to the next, by the number of tasks learned, over a network's.

    The weights deployed last, all trained ones where it uses them, and its memo; those before the first task are not
    counted. Columns: method, tasks, networks.
    """
    import pandas as pd

    rows, stream = [], glyphs(0, max(tasks), max(tasks))
    net = model(stream, "glyphs")
    size = nbytes(get_weights(net))
    for name, rule in (rules or KEPT).items():
        spy = Remembering(rule)
        result = run(stream, net, None, spy, replace(TRAINING, epochs=1), device="cpu", progress=False)
        for t in tasks:
            bytes_ = nbytes(result.weights[t - 1]) + nbytes(spy.memos.get(t - 1) or {})
            bytes_ += sum(map(nbytes, result.trained[:t])) if getattr(rule, "uses_history", False) else 0
            rows.append({"method": name, "tasks": t, "networks": bytes_ / size})
    return pd.DataFrame(rows)


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of tensors in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


KEPT: dict[str, Consolidation] = {
    "linear average": LINEAR,
    "HCMM": HCMM(),
    "HCMM, Fisher": HCMM(importance="fisher"),
    "MagMax": Merging("magmax", {"scale": 0.5}),
    "TIES": Merging("ties"),
}

STUDIES: dict[str, "Callable[[], pd.DataFrame]"] = {"paths": paths, "mismatches": mismatches, "kept": kept}

"""Lines between networks, and averages of several, in orders of their channels that matching finds.

```python
experiments.study(averages, range(5)).run()
```
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from clkit import ER, CLeWI, alignment, data, landscape, models, normalization, weights
from clkit.evaluation import evaluate
from clkit.training import Training, run
from studies import named

TRAINING = Training(epochs=6, batch=32, lr=0.1, schedule="cosine")
POINTS = "t", "loss", "accuracy"  # of a line


def between(
    seed: int, name: str = "digits", model: Callable[..., nn.Module] = models.convnet, epochs: int = 6
) -> list[dict[str, Any]]:
    """The line between two networks of different beginnings, a row for each of its variants.

    A row has the positions `t` with the mean loss and accuracy over classes there, and the barrier. `unmoved` is the
    share of channels that matching leaves in place. The seed draws the data and both beginnings.
    """
    drawn, training = named.drawn(name, seed), replace(TRAINING, epochs=epochs)
    joint, stream = (data.split(drawn, tasks) for tasks in (1, len(drawn.classes)))
    a, b = (run(joint, model, training=training, seed=start, progress=False) for start in (2 * seed, 2 * seed + 1))
    net, old, new = a.model.eval(), b.weights[0], a.weights[0]
    x = a.inputs[0][:500].to(next(net.parameters()).device)
    symmetry = alignment.symmetry(net, x[:2])
    found = alignment.align(symmetry, net, new, old, x).unmoved.values()
    lines = landscape.interpolation(net, old, new, stream, x, ts=11, symmetry=symmetry)
    return [row | {"unmoved": float(np.mean(list(found)))} for row in _rows(lines)]


def along(
    seed: int, memory: int, name: str = "digits", model: Callable[..., nn.Module] = models.convnet, epochs: int = 6
) -> list[dict[str, Any]]:
    """The line of CLeWI's last merge on five tasks, re-estimated: rows as of `between`, with the permutation or not.

    `identity` is the share of channels that each merge left in place. The seed draws data, order and beginning.
    """
    stream, rule = data.split(named.drawn(name, seed), tasks=5, order=seed), CLeWI(alpha=0.3)
    result = run(stream, model, ER(memory), rule, replace(TRAINING, epochs=epochs), seed=seed, progress=False)
    ends, inputs = (result.weights[3], result.trained[4]), result.inputs[4]
    kinds: tuple[landscape.Variant, ...] = ("plain, re-estimated", "aligned, re-estimated")
    lines = landscape.interpolation(result.model, *ends, stream, inputs, ts=11, variants=kinds)
    identity = [report["identity"] for report in result.reports[1:]]
    return [row | {"identity": identity} for row in _rows(lines)]


def _rows(lines: Mapping[str, landscape.Curve]) -> list[dict[str, Any]]:
    values = {name: (line.ts, line.loss.mean(1), line.accuracy.mean(1)) for name, line in lines.items()}
    points = {name: dict(zip(POINTS, map(np.ndarray.tolist, part), strict=True)) for name, part in values.items()}
    return [{"variant": name, **points[name], "barrier": line.barrier} for name, line in lines.items()]


def curves(table: pd.DataFrame) -> dict[str, list[landscape.Curve]]:
    """The lines in a table of `between` or `along`, by variant, one a seed."""
    parts = zip(table.variant, *(table[name].map(np.array) for name in POINTS), strict=True)
    found: dict[str, list[landscape.Curve]] = {name: [] for name in table.variant}
    for name, ts, loss, accuracy in parts:
        found[name].append(landscape.Curve(ts, loss[:, None], accuracy[:, None]))
    return found


def averages(seed: int, networks: int = 3, model: Callable[..., nn.Module] = models.convnet) -> list[dict[str, Any]]:
    """The average of networks of different beginnings, a row for each way to order their channels first.

    Its barrier is its test loss, BatchNorm re-estimated on 500 training images, over the mean loss of the networks,
    which are treated alike. The seed draws the data and the beginnings.
    """
    stream = data.split(named.drawn("digits", seed), tasks=1)
    starts = range(100 * seed, 100 * seed + networks)
    runs = [run(stream, model, training=TRAINING, seed=start, progress=False) for start in starts]
    net, ends, x = runs[0].model.eval(), [r.weights[0] for r in runs], runs[0].inputs[0][:500]
    symmetry = alignment.symmetry(net, x[:2])
    orders = {"as they are": [alignment.identity(symmetry)] * networks}
    for by in ("weights", "activations"):
        pairs = [alignment.align(symmetry, net, ends[0], end, x, by=by) for end in ends]
        common = alignment.align_many(symmetry, net, ends, x, by=by)
        orders[f"all like the first, by {by}"] = [found.permutations for found in pairs]
        orders[f"a common order, by {by}"] = [found.permutations for found in common]

    def tested(w: weights.Weights) -> tuple[float, float]:
        weights.set_weights(net, normalization.refresh(net, w, x))
        scores = evaluate(net, stream)
        return float(scores.loss.mean()), float(scores.accuracy.mean())

    parents, rows = sum(tested(end)[0] for end in ends) / networks, []
    for name, found in orders.items():
        moved = [alignment.permute(symmetry, p, end) for p, end in zip(found, ends, strict=True)]
        loss, accuracy = tested(weights.combine(moved, [1 / networks] * networks))
        rows.append({"order": name, "barrier": round(loss - parents, 5), "acc": round(accuracy, 5)})
    return rows


def left_aligned(rows: pd.DataFrame) -> Any:
    """The barrier that the permutation alone leaves, by seed."""
    return rows[rows.variant == "aligned"].set_index("seed").barrier


def repaired(rows: pd.DataFrame) -> Any:
    """The share of the barrier left by the permutation that re-estimation takes away, by seed."""
    barrier = rows.pivot(index="seed", columns="variant", values="barrier")
    return 1 - barrier["aligned, re-estimated"] / barrier["aligned"]


def saved_between(rows: pd.DataFrame) -> Any:
    """How much more accuracy the permutation gains between independent networks than along a stream, by seed."""
    acc = rows.pivot(index="seed", columns=["kind", "variant"], values="acc")
    gain = acc.xs("aligned, re-estimated", axis=1, level=1) - acc.xs("plain, re-estimated", axis=1, level=1)
    return gain["independent"] - gain["along"]

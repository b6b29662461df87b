"""Averages of several networks of different beginnings, in orders of their channels that matching finds.

```python
experiments.study(averages, range(5)).run()
```
"""

from collections.abc import Callable
from typing import Any

import pandas as pd
from torch import nn

from clkit import alignment, data, models, normalization, weights
from clkit.evaluation import evaluate
from clkit.training import Training, run
from studies import named

TRAINING = Training(epochs=6, batch=32, lr=0.1, schedule="cosine")


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

"""Averages of several networks of different beginnings, in orders of their channels that matching finds.

```python
experiments.study(averages, range(5)).run()
```
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clkit import alignment, data, models, normalization, weights
from clkit.data import Dataset, Examples, Normalize
from clkit.evaluation import evaluate
from clkit.training import Training, run

TRAINING = Training(epochs=6, batch=32, lr=0.1, schedule="cosine")


def drawn_digits(seed: int) -> Dataset:
    """The digits with a test quarter that the seed draws."""
    known = data.digits()
    x, y = (torch.cat([getattr(part, name) for part in (known.train, known.test)]) for name in "xy")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = (Examples(x[rows], y[rows]) for rows in order.tensor_split([len(x) // 4]))
    return Dataset("digits", train, test, known.classes, Normalize.of(train.x))


def averages(seed: int, networks: int = 3, model: Callable[..., nn.Module] = models.convnet) -> list[dict[str, Any]]:
    """The average of networks of different beginnings, a row for each way to order their channels first.

    Its barrier is its test loss, BatchNorm re-estimated on 500 training images, over the mean loss of the networks,
    which are treated alike. The seed draws the data and the beginnings.
    """
    stream = data.split(drawn_digits(seed), tasks=1)
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

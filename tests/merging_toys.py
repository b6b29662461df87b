"""Small weights to merge, what each row of MERGES needs, and how all of it moves along."""

import inspect
from functools import partial

import torch

from clkit import weights as W
from clkit.checks import Positive
from clkit.merging import MERGES, Merge, TaskVectors, opcm

PARAMETERS = {"conv.weight": (4, 3, 3, 3), "norm.weight": (4,), "linear.weight": (2, 4), "scalar": ()}
STATISTICS = {"norm.running_mean": (4,), "a.b.norm.running_var": (4,)}
SHAPES = PARAMETERS | STATISTICS
OUT, INNER = torch.tensor([1, 0]), torch.tensor([2, 0, 3, 1])  # permutations of the two groups of channels


def median(ws, *, base, scale: Positive = 1.0):
    """A merge of a user's own."""
    return TaskVectors(ws, base).merge(lambda piece, part: part.median(0).values, scale)


MINE = {
    "median": Merge(median, "our own"),
    "opcm, released": Merge(partial(opcm, projection="released", alpha=1.0), symmetric=False, exact=None),
}


def weights(seed, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for k, shape in shapes.items()}


def several(row, seed, dtype=torch.float64):
    return [weights(seed + i, dtype) for i in range(row.arity or 3)], weights(seed + 99, dtype)


def target(seed):
    return weights(seed + 500)


def near(aim):
    """A score: how near weights come to an aim."""
    return lambda w: -sum(float((w[name].double() - t).square().sum()) for name, t in aim.items())


def needed(row, seed, count=3, move=lambda w: w, channels=False):
    """The option that a row needs, if any; `move` maps a score's aim, `channels` permutes what knows of channels."""
    if row.needs == "score":
        return {"score": near(move(target(seed)))}
    if row.needs == "importances":
        known = [{k: v.square() for k, v in weights(seed + 700 + i).items() if k in PARAMETERS} for i in range(count)]
        return {"importances": [permuted(k) for k in known] if channels else known}
    if row.needs == "grams":
        x = [weights(seed + 300 + i, shapes={"x": (6, 4), "y": (40, 27)}) for i in range(count)]
        place = INNER if channels else torch.arange(4)
        grams = [{"linear.weight": p["x"][:, place].T @ p["x"][:, place], "conv.weight": p["y"].T @ p["y"]} for p in x]
        return {"grams": grams}
    return {}


def permuted(w):
    """The same function: the channels between the convolution and the linear layer permuted, and the outputs."""
    axes = {"conv.weight": (INNER,), "norm.weight": (INNER,), "linear.weight": (OUT, INNER)}
    axes |= dict.fromkeys(STATISTICS, (INNER,))
    return {name: _take(tensor, axes.get(name, ())) for name, tensor in w.items()}


def _take(tensor, places):
    for axis, place in enumerate(places):
        tensor = tensor.index_select(axis, place)
    return tensor


def run(name, ws, base, seed=1, **options):
    """A row called with all that it needs."""
    row = MERGES[name]
    return row(ws, base=base, **(needed(row, seed, len(ws)) | options))


def options(name):
    return inspect.signature(MERGES[name].function).parameters


def close(a, b, tolerance=1e-9):
    W.check_same(a, b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)


def apart(a, b):
    return W.norm(W.sub(a, b)) > 1e-6

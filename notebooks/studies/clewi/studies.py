"""CLeWI's studies that are no grids: curves along every merge, and permutations planted to be found again."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from clkit import alignment, data, landscape, models
from clkit.data import Dataset
from clkit.training import Training, run
from studies.clewi.grids import main

if TYPE_CHECKING:
    import pandas as pd


def curves(
    profile: str = "fast", seed: int = 0, names: Sequence[str] = ("ER", "BiC", "DER++", "ER-ACE")
) -> "pd.DataFrame":
    """Test accuracy along the line of every merge, old network aligned and statistics re-estimated at every point.

    Columns: method; after (tasks learned); alpha; accuracy, the mean over the tasks seen; new, on the newest of them;
    old, the mean over the others. Each run merges at its own alpha. Logits are the network's own, uncorrected.
    """
    import pandas as pd

    grid, kind = main(profile, "cifar100" if profile == "paper" else None), "aligned, re-estimated"
    tasks, net, rows = next(iter(grid.streams.values()))(seed), next(iter(grid.models.values())), []
    for name in names:
        method = grid.methods[f"{name} + CLeWI"]
        result = run(tasks, net, method.learner, method.consolidation, method.training or grid.training,
                     seed=seed, progress=False)  # fmt: skip
        found = landscape.merges(result.model, result.trained, result.weights, result.inputs, tasks, variants=[kind])
        for after, curve in enumerate((curve[kind] for curve in found), 2):
            for t, accuracy in zip(curve.ts.tolist(), curve.accuracy, strict=True):
                means = {"accuracy": accuracy.mean(), "new": accuracy[-1], "old": accuracy[:-1].mean()}
                rows.append({"method": name, "after": after, "alpha": t} | {n: float(v) for n, v in means.items()})
    return pd.DataFrame(rows)


def planted(seeds: Sequence[int] = (0, 1, 2), epochs: Sequence[int] = (0, 1, 3, 10, 30)) -> "pd.DataFrame":
    """How far apart two networks may be for a planted permutation to be found again, on synthetic data.

    Ten classes, each a random 8x8 picture under noise. A network that has learned five of them goes on to the other
    five for some `epochs`; its old self is permuted at random and matched with it on 100 inputs of all classes. `found`
    is the share of channels that come back to their place. Columns: seed, epochs, kind ("went on", or "began anew" for
    a network of another initialisation, whose channels have no true place), found, similarity.
    """
    import pandas as pd

    rows, small = [], partial(models.convnet, widths=(16, 32, 32))
    for seed in seeds:
        stream = data.split(_pictures(seed), 2)
        one, other = (replace(stream, tasks=(replace(task, index=0),)) for task in stream)
        training = Training(epochs=10, batch=32, lr=0.1)
        first = run(one, small, training=training, seed=seed, progress=False)
        net, old = first.model, first.weights[0]
        x = torch.cat([task.prepare(task.train.x[:50]) for task in stream])
        symmetry = alignment.symmetry(net, x[:2])
        hidden = alignment.random_permutations(symmetry, torch.Generator().manual_seed(seed))
        for count in epochs:
            further = replace(training, epochs=count)
            for kind, start in (("went on", net), ("began anew", partial(small, seed=seed + 1000))):
                begun = start if isinstance(start, torch.nn.Module) else start(stream)
                new = run(other, begun, training=further, seed=seed, progress=False).weights[0]
                match = alignment.align(symmetry, net, new, alignment.permute(symmetry, hidden, old), x)
                back = alignment.compose(hidden, match.permutations).values()
                home = torch.cat([p == torch.arange(len(p)) for p in back])
                similar = sum(match.similarity.values()) / len(match.similarity)
                found = {"found": float(home.float().mean()), "similarity": similar}
                rows.append({"seed": seed, "epochs": count, "kind": kind} | found)
    return pd.DataFrame(rows)


def _pictures(seed: int) -> Dataset:
    """Ten classes of synthetic 8x8 images: a picture of random grey values each, under as much noise."""
    g = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 160, (10, 1, 8, 8), generator=g)

    def examples(count: int) -> data.Examples:
        y = torch.arange(10).repeat_interleave(count)
        noise = torch.randint(0, 96, (len(y), 1, 8, 8), generator=g)
        return data.Examples((pictures[y] + noise).to(torch.uint8), y)

    return Dataset("pictures", examples(60), examples(20), tuple("0123456789"), data.Normalize((0.5,), (0.2,)))

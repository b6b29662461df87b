"""What networks represent while they learn, task after task, and when they are merged: the studies of notebook 09.

`likeness`, `drift`, `merging` and `correction` are functions of a seed. Each trains its own networks on small images
and gives a row for each thing measured. The other functions read tables and pictures off networks and such tables.

```python
table = page.table(study(representations.merging, range(5), network=representations.NETWORKS), "merging")
table.groupby(["network", "kind", "variant", "layer"]).ratio.mean()
```
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clkit import alignment, data, models, normalization, representation, weights
from clkit.data import Stream
from clkit.experiments import Method
from clkit.learners import ER, Learner
from clkit.training import ModelFactory, Result, Training, evaluate, run
from clkit.weights import Weights
from studies.named import drawn
from studies.pretraining import Recipe, restored

if TYPE_CHECKING:
    import pandas as pd


class Network(NamedTuple):
    """A network and how it is trained.

    - `training`: on all digits at once; `on_tasks`: on the digits in five tasks, None for a network that never is
    - `layers`: those whose units are measured, before their nonlinearities
    """

    model: ModelFactory
    training: Training
    layers: tuple[str, ...]
    on_tasks: Training | None = None


CONVNET = Network(
    models.convnet,
    Training(6, 32, 0.1, schedule="cosine"),
    ("norm1", "norm2", "norm3", "linear"),
    Training(6, 32, 0.1),
)
NETWORKS = {
    "convnet": CONVNET,
    "perceptron": Network(
        partial(models.mlp, hidden=(128,) * 5),
        Training(12, 32, 0.1, schedule="cosine"),
        ("linear1", "linear2", "linear3", "linear4", "linear5", "linear"),
    ),
}
LAYERS = ("conv1", "relu1", "conv2", "relu2", "conv3", "relu3", "pool", "linear")
STAGES = ("relu1", "relu2", "relu3", "linear")
ENCODING = Training(10, 64, 3e-3, optimizer="adamw", schedule="cosine", warmup=0.1, weight_decay=0.01)
TUNING = Training(5, 64, 1e-3, optimizer="adamw", schedule="cosine", warmup=0.1, clip=1.0, labels="task")
PLAIN = Method(Learner())


@dataclass(frozen=True, eq=False)
class Pair:
    """Two networks of one architecture, how they began, and the digits to look at them with.

    - `model`: of their architecture; `stream`: what they are tested on
    - `a`, `b`: their weights; `before`: those of both before training
    - `x`, `y`: prepared test inputs (N, 1, 8, 8) and their labels (N,); `inputs`: 500 prepared training inputs
    """

    model: nn.Module
    stream: Stream
    a: Weights
    b: Weights
    before: tuple[Weights, Weights]
    x: Tensor
    y: Tensor
    inputs: Tensor


def pair(seed: int = 0, network: Network = CONVNET) -> Pair:
    """Trains two networks of a seed on the ten digits at once, from initialisations of their own, on the CPU."""
    stream, seeds = data.split(drawn("digits", seed), 1), (2 * seed, 2 * seed + 1)
    one, other = (_run(stream, network.model, PLAIN, network.training, s) for s in seeds)
    first, second = (weights.get_weights(network.model(stream, seed=s)) for s in seeds)
    return _pair(one.model, seed, one.weights[0], other.weights[0], (first, second))


def five_tasks(seed: int = 0) -> Stream:
    """The ten digits in five tasks of two: the seed draws their order and the test quarter of the images."""
    return data.split(drawn("digits", seed), 5, order=seed)


def learned(method: Method, seed: int = 0, network: Network = CONVNET) -> Result:
    """A run of a method on the digits in five tasks, on the CPU; of a network that is trained on tasks."""
    training = network.on_tasks or network.training
    return _run(five_tasks(seed), network.model, method, training, seed)


def letters(seed: int = 0, tasks: int = 4, per_class: int = 40) -> Stream:
    """Forty-eight Greek letters at 16 x 16 pixels in tasks of equal size, in an order that the seed draws."""
    full = data.glyphs("greek", per_class=per_class, size=16, jitter=1.5, seed=seed)
    return data.split(replace(full, normalize=_latin(seed, per_class)[0].normalize), tasks, order=seed)


def latin_encoder(stream: Stream, per_class: int = 40, training: Training = ENCODING, *, seed: int = 0) -> nn.Module:
    """An encoder of Latin letters, under a frozen head that knows every Greek letter of a stream beforehand.

    The head has the prototypes of three other images a class, as HCMM's text head has those of words.
    """
    source, _ = restored(Recipe(models.encoder, training, partial(_latin, per_class=per_class)), seed)
    body = source.get_submodule("encoder").eval()
    shown = data.glyphs("greek", per_class=3, size=16, jitter=1.5, seed=seed + 10_000).train
    return models.with_prototypes(body, models.prototypes(body, stream[0].prepare(shown.x), shown.y))


def likeness(seed: int, network: Network = CONVNET, layers: tuple[str, ...] = LAYERS) -> list[dict[str, Any]]:
    """Linear CKA of every layer with every layer, of two trained networks and of the two before their training.

    Columns: pair, layer (of the first network), other (of the second), cka.
    """
    two, rows = pair(seed, network), []
    for name, ends in {"both trained": (two.a, two.b), "neither trained": two.before}.items():
        first, second = (representation.with_weights(two.model, w) for w in ends)
        found = representation.cka_by_layer(first, second, two.x, layers).to_numpy(float).round(5).ravel().tolist()
        for (layer, other), value in zip(product(layers, repeat=2), found, strict=True):
            rows.append({"pair": name, "layer": layer, "other": other, "cka": value})
    return rows


def drift(seed: int, method: Method, network: Network = CONVNET) -> "pd.DataFrame":
    """How far the features of every task's test data have moved since it was learned, after each task.

    - task, after (the tasks learned since)
    - cka (linear, unbiased), l1, l2, cosine: against the network just after the task was learned
    - accuracy: of the network
    - readout: of a linear readout fitted anew to these features, on the training data of all tasks so far. It tells
      what the features know, whatever the head has forgotten.
    - control: the same of the features of the network before any training

    Features are the inputs of the head.
    """
    import pandas as pd

    stream, result, rows = five_tasks(seed), learned(method, seed, network), []
    untrained = network.model(stream, seed=seed)
    nets = [representation.with_weights(result.model, w) for w in result.weights]
    for now, net in enumerate(nets):
        readout, control = (_readout(n, stream, now + 1) for n in (net, untrained))
        for task in stream.tasks[: now + 1]:
            x = task.prepare(task.test.x)
            then, here, blank = (representation.features(n, x) for n in (nets[task.index], net, untrained))
            far = representation.mismatch(then, here).iloc[0]
            row: dict[str, Any] = {"task": task.index, "after": now - task.index}
            row["cka"] = representation.cka(then, here, unbiased=True)
            row |= {name: float(far[name]) for name in ("l1", "l2", "cosine")}
            row["accuracy"] = float(result.accuracy[now, task.index])
            found = {"readout": readout(here), "control": control(blank)}
            rows.append(row | {name: float((y == task.test.y).double().mean()) for name, y in found.items()})
    return pd.DataFrame(rows).round(5)


def merging(seed: int, network: Network = CONVNET) -> list[dict[str, Any]]:
    """What the mean of two networks keeps of their units, layer by layer, and what alignment and repair give back.

    - kind: "independent", two initialisations; "sequential", before and after the last of five tasks, with ER
    - variant: "plain"; "aligned", the second permuted to look like the first; and both with ", restored": BatchNorm
      re-estimated, or, where there is none, REPAIR
    - layer; ratio: of variance, as `variance_ratio` has it
    - correlation: the mean over units i of those of the two ends
    - accuracy: of the merged network, on all classes; parents: the mean of the two ends'
    """
    pairs = {"independent": pair(seed, network)}
    if network.on_tasks:
        result = learned(Method(ER(memory=50)), seed, network)
        a, b = result.weights[-2:]
        pairs["sequential"] = _pair(result.model, seed, a, b, (a, a))
    return [{"kind": kind} | row for kind, two in pairs.items() for row in _merged(two, network.layers)]


def correction(
    seed: int, strength: Method, per_class: int = 40, earlier: Training = ENCODING, training: Training = TUNING
) -> list[dict[str, Any]]:
    """How far merges of one strength of HCMM's correction take features from those of the network before.

    - task: the one just merged
    - new: the root mean squared distance, on the training images of that task
    - old: the same, on the test images of earlier tasks
    - accuracy: of the merged network, on all classes, those not learned yet among them
    """
    stream, rows = letters(seed, per_class=per_class), []
    result = _run(stream, latin_encoder(stream, per_class, earlier, seed=seed), strength, training, seed)
    nets = [representation.with_weights(result.model, w).get_submodule("encoder") for w in result.weights]
    for t in range(1, len(stream)):
        old = torch.cat([task.prepare(task.test.x) for task in stream.tasks[:t]])
        row: dict[str, Any] = {"task": t}
        for name, x in {"new": stream[t].prepare(stream[t].train.x), "old": old}.items():
            before, after = (representation.features(net, x, "projection") for net in nets[t - 1 : t + 1])
            row[name] = round(float((after - before).square().mean().sqrt()), 5)
        rows.append(row | {"accuracy": round(float(result.accuracy[t].mean()), 5)})
    return rows


def few_examples(a: Tensor, b: Tensor, sizes: Iterable[int], draws: int = 20) -> "pd.DataFrame":
    """CKA of two networks' features (N, F) of unrelated examples, on few of them.

    Columns: n, estimate ("biased", "unbiased"), cka. A row for each of the `draws` of n examples.
    """
    import pandas as pd

    generator, rows = torch.Generator().manual_seed(0), []
    for n, _ in product(sizes, range(draws)):
        chosen, other = (torch.randperm(len(a), generator=generator)[:n] for _ in range(2))
        for estimate in ("biased", "unbiased"):
            found = representation.cka(a[chosen], b[other], unbiased=estimate == "unbiased")
            rows.append({"n": n, "estimate": estimate, "cka": found})
    return pd.DataFrame(rows)


def counterparts(table: "pd.DataFrame") -> "pd.Series":
    """By seed, how often the most alike of the other network's STAGES is the same one: trained less untrained networks.

    A share, from a table of `likeness`.
    """
    rows: Any = table[table["layer"].isin(STAGES) & table["other"].isin(STAGES)]
    top = rows.loc[rows.groupby(["pair", "seed", "layer"])["cka"].idxmax()]
    share: Any = (top["layer"] == top["other"]).groupby([top["pair"], top["seed"]]).mean()
    return share["both trained"] - share["neither trained"]


def forgotten(table: "pd.DataFrame") -> "pd.DataFrame":
    """The means of a table of `drift` over all tasks but the last, at the end of each run, and what was forgotten.

    Added columns: drift, 1 less the CKA; forgetting, the accuracy just after learning less that of the end; and
    readout_lost, the same of the new readout.
    """
    by, last = ["method", "seed"], table["task"].max()
    old: Any = table[table["task"] < last]
    first: Any = old[old["after"] == 0].groupby(by, sort=False)[["accuracy", "readout"]].mean()
    end: Any = old[old["after"] == last - old["task"]].groupby(by, sort=False)
    means = end[["cka", "l1", "l2", "cosine", "accuracy", "readout", "control"]].mean()
    lost: Any = first - means[["accuracy", "readout"]]
    means = means.assign(drift=1 - means["cka"], forgetting=lost["accuracy"], readout_lost=lost["readout"])
    return means.reset_index()


def farther(table: "pd.DataFrame", a: str, b: str, value: str) -> "pd.Series":
    """By seed, `value` of `forgotten` of one method of a table of `drift` less that of another."""
    found: Any = forgotten(table).pivot(index="seed", columns="method", values=value)
    return found[a] - found[b]


def recovered(table: "pd.DataFrame") -> "pd.Series":
    """By seed, the share of the accuracy lost in an aligned merge that its variance, restored, gives back.

    The mean over the networks of a table of `merging`.
    """
    first: Any = table.groupby(["network", "seed", "variant"])[["accuracy", "parents"]].first()
    merged, parents = first["accuracy"].unstack(), first["parents"].unstack()["aligned"]
    gain: Any = (merged["aligned, restored"] - merged["aligned"]) / (parents - merged["aligned"])
    return gain.groupby("seed").mean()


def beside_none(table: "pd.DataFrame") -> "pd.DataFrame":
    """A table of `correction` with a row for each strength and seed, beside the run without a correction, "none".

    Columns: strength, seed, new and old, means over tasks, accuracy, at the end; and the same with "_none".
    """
    by, end = ["strength", "seed"], table[table["task"] == table["task"].max()]
    rows: Any = table.groupby(by, sort=False)[["new", "old"]].mean()
    rows = rows.assign(accuracy=end.set_index(by)["accuracy"]).reset_index()
    none = rows[rows["strength"] == "none"].drop(columns="strength")
    return rows[rows["strength"] != "none"].merge(none, on="seed", suffixes=("", "_none"))


def united(model: nn.Module, old: Weights, new: Weights, alpha: float, inputs: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Features (N, F) of inputs `x` (N, ...) in two networks, "old" and "new", and in their merge, "merged".

    That is alpha of old, with BatchNorm's statistics re-estimated on `inputs`.
    """
    merged = normalization.refresh(model, weights.lerp(new, old, alpha), inputs)
    networks = {"old": old, "new": new, "merged": merged}
    return {name: representation.features(model, x, weights=w) for name, w in networks.items()}


def gap(points: "pd.DataFrame") -> float:
    """How far apart two models' points lie in a plane: the distance of their centres, in mean radii of the two clouds.

    `points` are those of `representation.embed`, under two models.
    """
    one, other = (rows[["x", "y"]].to_numpy() for _, rows in points.groupby("model", sort=False))
    radius = np.mean([np.linalg.norm(cloud - cloud.mean(0), axis=1).mean() for cloud in (one, other)])
    return float(np.linalg.norm(one.mean(0) - other.mean(0)) / radius)


def moved(features: Tensor, size: float, noise: bool = False, **options: Any) -> representation.Embedding:
    """Features of one class (N, F) and a copy of them, moved, embedded together: a picture of a known distance.

    All are moved alike, in one random direction, or, with `noise`, each in a direction of its own; both by `size` times
    the root mean squared distance of an example to their centre. `options` go to `embed`.
    """
    spread = (features - features.mean(0)).square().mean(1).sqrt().mean()
    count = len(features) if noise else 1
    way = torch.randn(count, features.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    way *= size * spread / way.square().mean(1, keepdim=True).sqrt()
    both = {"one": features, "moved": features + way.to(features.dtype)}
    return representation.embed(both, torch.zeros(len(features), dtype=torch.int64), **options)


def _run(stream: Stream, model: nn.Module | ModelFactory, method: Method, training: Training, seed: int) -> Result:
    rules = method.learner, method.consolidation
    return run(stream, model, *rules, training, seed=seed, device="cpu", progress=False)


def _latin(seed: int, per_class: int) -> Stream:
    return data.split(data.glyphs("latin", per_class=per_class, size=16, seed=seed), 1)


def _pair(model: nn.Module, seed: int, a: Weights, b: Weights, before: tuple[Weights, Weights]) -> Pair:
    """Two networks with the images of all ten digits."""
    stream = data.split(drawn("digits", seed), 1)
    inputs, x = stream[0].prepare(stream[0].train.x[:500]), stream[0].prepare(stream[0].test.x)
    return Pair(model.eval(), stream, a, b, before, x, stream[0].test.y, inputs)


def _readout(net: nn.Module, stream: Stream, tasks: int) -> Any:
    """A linear readout of features, fitted to the training data of the first tasks: features to labels."""
    parts = stream.tasks[:tasks]
    x = torch.cat([task.prepare(task.train.x) for task in parts])
    y = torch.cat([task.train.y for task in parts])
    rows = representation.features(net, x).double()
    mean, scale = rows.mean(0), rows.std(0).clamp(min=1e-8)

    def design(features: Tensor) -> Tensor:
        return torch.nn.functional.pad((features.double() - mean) / scale, (0, 1), value=1.0)

    own, targets = design(rows), torch.nn.functional.one_hot(y, len(stream.classes)).double()
    eye = torch.eye(own.shape[1], dtype=torch.double)
    solution = torch.linalg.solve(own.T @ own + 0.001 * len(own) * eye, own.T @ targets)
    return lambda features: (design(features) @ solution).argmax(1)


def _merged(two: Pair, layers: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of `merging` for one pair of networks."""
    symmetry = alignment.symmetry(two.model, two.inputs[:2])
    match = alignment.align(symmetry, two.model, two.a, two.b, two.inputs)
    rows = []

    def accuracy(w: Weights) -> float:
        return float(evaluate(representation.with_weights(two.model, w), two.stream).accuracy.mean())

    parents = (accuracy(two.a) + accuracy(two.b)) / 2
    for ends, b in (("plain", two.b), ("aligned", alignment.permute(symmetry, match.permutations, two.b))):
        alike = {
            layer: float(representation.correlations(two.model, two.a, b, two.x, layer).diagonal().mean())
            for layer in layers
        }
        merged = weights.lerp(two.a, b, 0.5)
        if normalization.batchnorms(two.model):
            restored = normalization.refresh(two.model, merged, two.inputs)
        else:
            restored = normalization.repair(two.model, merged, ends=(two.a, b), t=0.5, inputs=two.inputs)
        networks = {ends: merged, f"{ends}, restored": restored}
        for variant, w in networks.items():
            reached = {"accuracy": round(accuracy(w), 5), "parents": round(parents, 5)}
            table = representation.variance_ratio(two.model, w, (two.a, b), two.x, layers)
            for layer, ratio in zip(table["layer"], table["ratio"], strict=True):
                row = {"variant": variant, "layer": layer, "ratio": round(float(ratio), 5)}
                rows.append(row | {"correlation": round(alike[layer], 5)} | reached)
    return rows

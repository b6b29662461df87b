"""The studies: each trains its own networks and gives a table with a row for each thing measured."""

from collections.abc import Iterable
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clkit import alignment, data, models, normalization, representation, weights
from clkit.data import Stream
from clkit.evaluation import evaluate
from clkit.representation import with_weights
from clkit.training import Training
from clkit.weights import Weights
from studies.representations.networks import (
    ENCODING,
    LAYERS,
    METHODS,
    SEEDS,
    SETTINGS,
    STRENGTHS,
    TASKS,
    TRAINING,
    TUNING,
    Pair,
    corrected,
    encoder,
    learned,
    letters,
    pair,
)

if TYPE_CHECKING:
    import pandas as pd

STUDIES = ("similarity", "drift", "merging", "correction")


def config(study: str, seeds: Iterable[int] = SEEDS) -> dict[str, Any]:
    """What one of `STUDIES` depends on, in words."""
    if study not in STUDIES:
        raise ValueError(f"study: {study!r} is unknown; choose one of {', '.join(STUDIES)}")
    made: dict[str, Any] = {"study": study, "seeds": list(seeds), "training": repr(TRAINING)}
    if study == "drift":
        return made | {"tasks": TASKS, "methods": {name: repr(method) for name, method in METHODS.items()}}
    if study == "correction":
        return made | {"training": repr(TUNING), "earlier": repr(ENCODING), "strengths": STRENGTHS}
    return made | (
        {"layers": LAYERS} if study == "similarity" else {"networks": {n: s[2] for n, s in SETTINGS.items()}}
    )


def similarity(seeds: Iterable[int] = SEEDS, **made: Any) -> "pd.DataFrame":
    """CKA of every layer with every layer: of two trained networks, of two untrained ones, before and after training.

    Columns: seed, pair, layer (of the first network), other (of the second), linear, rbf. `made` is passed to `pair`.
    """
    import pandas as pd

    rows = []
    for seed in seeds:
        two = pair(seed, **made)
        pairs = {"both trained": (two.a, two.b), "neither trained": two.before}
        pairs["before and after training"] = (two.before[0], two.a)
        for name, ends in pairs.items():
            first, second = (with_weights(two.model, w) for w in ends)
            tables = [representation.cka_by_layer(first, second, two.x, LAYERS, kernel=k) for k in ("linear", "rbf")]
            linear, rbf = (table.to_numpy(float).round(5) for table in tables)
            for (i, layer), (j, other) in product(enumerate(LAYERS), repeat=2):
                row = {"seed": seed, "pair": name, "layer": layer, "other": other}
                rows.append(row | {"linear": float(linear[i, j]), "rbf": float(rbf[i, j])})
    return pd.DataFrame(rows)


def drift(seeds: Iterable[int] = SEEDS, training: Training | None = None) -> "pd.DataFrame":
    """How far the features of every task's test data have moved since it was learned, after each task.

    Columns: method, seed, task, after (the tasks learned since), cka (linear, unbiased), l1, l2, cosine, all against
    the network just after the task was learned; accuracy of the network; readout, the accuracy of a linear readout
    fitted anew to these features on the training data of all tasks so far: what the features know, whatever the head
    has forgotten; and control, that of a readout of the features of the network before any training. Features are the
    inputs of the head.
    """
    import pandas as pd

    rows = []
    for seed in seeds:
        stream = data.split(data.digits(), TASKS, order=seed)
        untrained = models.convnet(stream, seed=seed)
        controls = [_readout(untrained, stream, now + 1) for now in range(TASKS)]
        for method in METHODS:
            result = learned(method, seed, training)
            nets = [with_weights(result.model, w) for w in result.weights]
            for now, net in enumerate(nets):
                readout = _readout(net, stream, now + 1)
                for task in stream.tasks[: now + 1]:
                    x = task.prepare(task.test.x)
                    then, here = (representation.features(n, x) for n in (nets[task.index], net))
                    moved = representation.mismatch(then, here).iloc[0]
                    row = {"method": method, "seed": seed, "task": task.index, "after": now - task.index}
                    row["cka"] = representation.cka(then, here, unbiased=True)
                    row |= {name: float(moved[name]) for name in ("l1", "l2", "cosine")}
                    row["accuracy"] = float(result.accuracy[now, task.index])
                    found = {"readout": readout(here)}
                    found["control"] = controls[now](representation.features(untrained, x))
                    row |= {name: float((y == task.test.y).double().mean()) for name, y in found.items()}
                    rows.append({name: round(v, 5) if isinstance(v, float) else v for name, v in row.items()})
    return pd.DataFrame(rows)


def merging(seeds: Iterable[int] = SEEDS, training: Training | None = None) -> "pd.DataFrame":
    """What the mean of two networks keeps of their units, layer by layer, and what alignment and repair give back.

    Columns: seed, network, kind ("independent": two initialisations; "sequential": before and after the last of five
    tasks, ER), ends ("plain", or "aligned": the second permuted to look like the first), variant ("merged",
    "refreshed", "repaired"), layer, ratio (of variance, as `variance_ratio` has it), correlation (the mean over units
    i of those of the two ends), accuracy (of the merged network, on all classes) and parents (the mean of the two
    ends').
    """
    import pandas as pd

    rows = []
    for seed in seeds:
        for network, (_, _, layers) in SETTINGS.items():
            two = pair(seed, network, training)
            found = [("independent", two)]
            if network == "convnet":
                found.append(("sequential", _sequential(seed, training)))
            for kind, one in found:
                for row in _merged(one, layers):
                    rows.append({"seed": seed, "network": network, "kind": kind} | row)
    return pd.DataFrame(rows)


def correction(
    seeds: Iterable[int] = SEEDS, per_class: int = 40, earlier: Training = ENCODING, training: Training = TUNING
) -> "pd.DataFrame":
    """HCMM's merges with and without its correction: mismatch, on the newest task's data and on old classes' images.

    Columns: seed, strength, task, new (the root mean squared distance of the merged network's features to the previous
    network's, on the training images of the task just merged), old (the same on the test images of earlier tasks) and
    accuracy (of the merged network, on all classes, those not learned yet among them).
    """
    import pandas as pd

    rows = []
    for seed in seeds:
        stream = letters(seed, per_class=per_class)
        model = encoder(stream, per_class, earlier, seed=seed)
        for strength in STRENGTHS:
            result = corrected(model, stream, strength, seed, training)
            nets = [with_weights(result.model, w).get_submodule("encoder") for w in result.weights]
            for t in range(1, len(stream)):
                old = torch.cat([task.prepare(task.test.x) for task in stream.tasks[:t]])
                inputs = {"new": stream[t].prepare(stream[t].train.x), "old": old}
                row: dict[str, Any] = {"seed": seed, "strength": strength, "task": t}
                for name, x in inputs.items():
                    before, after = (representation.features(net, x, "projection") for net in nets[t - 1 : t + 1])
                    row[name] = round(float((after - before).square().mean().sqrt()), 5)
                rows.append(row | {"accuracy": round(float(result.accuracy[t].mean()), 5)})
    return pd.DataFrame(rows)


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


def _sequential(seed: int, training: Training | None) -> Pair:
    """The network after the task before last and after the last one, tested on all classes."""
    result = learned("ER", seed, training)
    stream = data.split(data.digits(), TASKS, order=seed)
    task = data.split(data.digits(), 1)[0]
    a, b = result.weights[-2:]
    inputs, x = task.prepare(task.train.x[:500]), task.prepare(task.test.x)
    return Pair(result.model.eval(), stream, a, b, (a, a), x, task.test.y, inputs)


def _merged(two: Pair, layers: tuple[str, ...]) -> list[dict[str, Any]]:
    symmetry = alignment.symmetry(two.model, two.inputs[:2])
    match = alignment.align(symmetry, two.model, two.a, two.b, two.inputs)
    rows = []

    def accuracy(w: Weights) -> float:
        return float(evaluate(with_weights(two.model, w), two.stream).accuracy.mean())

    parents = (accuracy(two.a) + accuracy(two.b)) / 2
    for ends, b in (("plain", two.b), ("aligned", alignment.permute(symmetry, match.permutations, two.b))):
        alike = {
            layer: float(representation.correlations(two.model, two.a, b, two.x, layer).diagonal().mean())
            for layer in layers
        }
        merged = weights.lerp(two.a, b, 0.5)
        networks = {
            "merged": merged,
            "refreshed": normalization.refresh(two.model, merged, two.inputs),
            "repaired": normalization.repair(two.model, merged, ends=(two.a, b), t=0.5, inputs=two.inputs),
        }
        for variant, w in networks.items():
            reached = {"accuracy": round(accuracy(w), 5), "parents": round(parents, 5)}
            table = representation.variance_ratio(two.model, w, (two.a, b), two.x, layers)
            for layer, ratio in zip(table["layer"], table["ratio"], strict=True):
                row = {"ends": ends, "variant": variant, "layer": layer, "ratio": round(float(ratio), 5)}
                rows.append(row | {"correlation": round(alike[layer], 5)} | reached)
    return rows

"""What networks represent while they learn, task after task, and when they are merged: the studies of notebook 09.

All are on small images and several seeds; each study trains its own networks and gives a table with a row for each
thing measured. `correction` has a network of its own: an encoder pretrained on Latin letters, under a frozen head that
knows every Greek letter beforehand, as HCMM's text head does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from clkit import alignment, data, models, normalization, representation, weights
from clkit.consolidation import HCMM, SFA, CLeWI, Consolidation
from clkit.data import Stream
from clkit.evaluation import evaluate
from clkit.experiments.statistics import paired_difference
from clkit.learners import ER, Learner
from clkit.representation import with_weights
from clkit.training import Result, Training, run
from clkit.weights import Weights

if TYPE_CHECKING:
    import pandas as pd

SEEDS = range(5)
TASKS = 5
TRAINING = Training(6, 32, 0.1, schedule="cosine")
SETTINGS: Mapping[str, tuple[Any, Training, tuple[str, ...]]] = {
    "convnet": (models.convnet, TRAINING, ("norm1", "norm2", "norm3", "linear")),
    "perceptron": (
        partial(models.mlp, hidden=(128,) * 5),
        replace(TRAINING, epochs=12),
        ("linear1", "linear2", "linear3", "linear4", "linear5", "linear"),
    ),
}
"""The network, its training, and the layers whose units are measured before their nonlinearities."""
LAYERS = ("conv1", "relu1", "conv2", "relu2", "conv3", "relu3", "pool", "linear")
METHODS: Mapping[str, tuple[Learner, Consolidation | None]] = {
    "fine-tuning": (Learner(), None),
    "ER": (ER(memory=50), None),
    "CLeWI": (ER(memory=50), CLeWI(alpha=0.3, points=0)),
    "SFA": (ER(memory=50), SFA(p=0.25, beta=0.3, refresh=True)),
}
"""CLeWI and SFA are on top of ER, with the same memory."""
STRENGTHS: Mapping[str, Mapping[str, Any]] = {
    "none": {"correction": "none"},
    "steps, 1e-7 (released)": {"correction": "steps", "correction_lr": 1e-7},
    "ridge 100": {"correction": "ridge", "ridge": 100.0},
    "ridge 10": {"correction": "ridge", "ridge": 10.0},
    "ridge 1": {"correction": "ridge", "ridge": 1.0},
}
ENCODING = Training(10, 64, 3e-3, optimizer="adamw", schedule="cosine", warmup=0.1, weight_decay=0.01)
TUNING = Training(5, 64, 1e-3, optimizer="adamw", schedule="cosine", warmup=0.1, clip=1.0, labels="task")
STUDIES = ("similarity", "drift", "merging", "correction")


@dataclass(frozen=True, eq=False)
class Pair:
    """Two networks trained on all classes at once, from initialisations of their own, and how they began.

    - `model`: of their architecture; `stream`: their data, one task
    - `a`, `b`: weights after training; `before`: of both before it
    - `x`, `y`: prepared test inputs and their labels; `inputs`: prepared training inputs
    """

    model: nn.Module
    stream: Stream
    a: Weights
    b: Weights
    before: tuple[Weights, Weights]
    x: Tensor
    y: Tensor
    inputs: Tensor


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


def pair(seed: int = 0, network: str = "convnet", training: Training | None = None) -> Pair:
    """Trains two networks of a seed on the ten digits at once, on the CPU."""
    factory, usual, _ = SETTINGS[network]
    stream = data.split(data.digits(), 1)
    seeds = (2 * seed, 2 * seed + 1)
    runs = [_run(stream, factory, None, None, training or usual, s) for s in seeds]
    before = [weights.get_weights(factory(stream, seed=s)) for s in seeds]
    task, (a, b) = stream[0], (r.weights[0] for r in runs)
    inputs, x = task.prepare(task.train.x[:500]), task.prepare(task.test.x)
    return Pair(runs[0].model.eval(), stream, a, b, (before[0], before[1]), x, task.test.y, inputs)


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


def learned(method: str, seed: int = 0, training: Training | None = None) -> Result:
    """One of `METHODS` on the ten digits in five tasks of two, in an order that the seed draws."""
    stream = data.split(data.digits(), TASKS, order=seed)
    return _run(stream, models.convnet, *METHODS[method], training or replace(TRAINING, schedule="constant"), seed)


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


def few_examples(a: Tensor, b: Tensor, sizes: Iterable[int], draws: int = 20, seed: int = 0) -> "pd.DataFrame":
    """CKA of two networks' features (N, F) of the same examples, on few of them: biased and unbiased.

    Columns: n, images ("the same"; "shuffled", where nothing connects the two), estimate ("biased", "unbiased"), cka. A
    row for each of the `draws` of n examples.
    """
    import pandas as pd

    generator, rows = torch.Generator().manual_seed(seed), []
    for n in [n for n in sizes for _ in range(draws)]:
        chosen = torch.randperm(len(a), generator=generator)[:n]
        shuffled = chosen[torch.randperm(n, generator=generator)]
        for images, other in (("the same", chosen), ("shuffled", shuffled)):
            for estimate in ("biased", "unbiased"):
                found = representation.cka(a[chosen], b[other], unbiased=estimate == "unbiased")
                rows.append({"n": n, "images": images, "estimate": estimate, "cka": found})
    return pd.DataFrame(rows)


def forgotten(drift: "pd.DataFrame") -> "pd.DataFrame":
    """The means of `drift` over all tasks but the last at the end of each run, with what was forgotten until then.

    Added columns: forgetting, the accuracy just after learning less that of the end, and readout_lost, the same of the
    new readout.
    """
    by = ["method", "seed"]
    old: Any = drift[drift["task"] < TASKS - 1]
    first: Any = old[old["after"] == 0].groupby(by, sort=False)[["accuracy", "readout"]].mean()
    end: Any = old[old["after"] == TASKS - 1 - old["task"]].groupby(by, sort=False)
    table = end[["cka", "l1", "l2", "cosine", "accuracy", "readout", "control"]].mean()
    table = table.assign(forgetting=first["accuracy"] - table["accuracy"])
    return table.assign(readout_lost=first["readout"] - table["readout"]).reset_index()


def restored(merging: "pd.DataFrame") -> "pd.DataFrame":
    """The rows of `merging` without the repair that a network has no need of, with ends and variant in one word.

    `variant` becomes "plain", "plain, restored", "aligned" or "aligned, restored": with BatchNorm by re-estimation,
    without it by REPAIR.
    """
    network: Any = merging["network"]
    wanted = network.map({"convnet": "refreshed", "perceptron": "repaired"})
    table: Any = merging[(merging["variant"] == "merged") | (merging["variant"] == wanted)]
    return table.assign(variant=table["ends"] + table["variant"].map(lambda v: "" if v == "merged" else ", restored"))


def along(two: Pair, ends: Mapping[str, Weights], layers: Iterable[str], points: int = 9) -> "pd.DataFrame":
    """The variance ratio on the ways from a pair's first network to each of `ends`.

    Columns: t, variant (the end's name and the layer), ratio.
    """
    import pandas as pd

    rows, names = [], list(layers)
    for end, second in ends.items():
        for t in np.linspace(0, 1, points).tolist():
            merged = weights.lerp(two.a, second, t)
            table = representation.variance_ratio(two.model, merged, (two.a, second), two.x[:200], names)
            for layer, ratio in zip(table["layer"], table["ratio"], strict=True):
                rows.append({"t": t, "variant": f"{end}, {layer}", "ratio": float(ratio)})
    return pd.DataFrame(rows)


def than_er(forgotten: "pd.DataFrame") -> "pd.DataFrame":
    """Of the table of `forgotten`, whether each method drifts and forgets more than ER ("gains") or less ("loses").

    By Student's paired interval over seeds; "open" where it holds 0. A row for each method, columns l1, l2, cosine,
    cka (of which 1 less it is the drift) and forgetting.
    """
    import pandas as pd

    table = forgotten.assign(cka=1 - forgotten["cka"])
    names = [name for name in dict.fromkeys(table["method"]) if name != "ER"]
    return pd.DataFrame(
        {
            value: [paired_difference(table, name, "ER", value, by=["seed"]).verdict for name in names]
            for value in ("l1", "l2", "cosine", "cka", "forgetting")
        },
        index=names,
    )


def counterparts(similarity: "pd.DataFrame", layers: Iterable[str]) -> "pd.Series":
    """Of `similarity`, how often a layer's most alike one of the other network, by linear CKA, is the same: by pair."""
    names = list(layers)
    table: Any = similarity[similarity["layer"].isin(names) & similarity["other"].isin(names)]
    top = table.loc[table.groupby(["pair", "seed", "layer"])["linear"].idxmax()]
    return (top["layer"] == top["other"]).groupby(top["pair"]).mean()


def stations(result: Result, x: Tensor, alphas: Iterable[float]) -> dict[str, Tensor]:
    """Features of `x` before and after the last task, "old" and "new", and of the networks between, "α = ..." of old.

    BatchNorm's statistics are those of the two ends, and re-estimated between them on what the run's consolidation saw.
    """
    old, new, inputs = result.weights[-2], result.trained[-1], result.inputs[-1]
    between = {f"α = {a:g}": normalization.refresh(result.model, weights.lerp(new, old, a), inputs) for a in alphas}
    networks = {"old": old, "new": new} | between
    return {name: representation.features(result.model, x, weights=w) for name, w in networks.items()}


def halfway(two: Pair, second: Weights, x: Tensor) -> dict[str, Tensor]:
    """Features of `x` in a pair's first network, in `second`, and in their mean, re-estimated: one, other, merged."""
    middle = normalization.refresh(two.model, weights.lerp(two.a, second, 0.5), two.inputs)
    networks = {"one": two.a, "other": second, "merged": middle}
    return {name: representation.features(two.model, x, weights=w) for name, w in networks.items()}


def clouds(
    strengths: Iterable[str],
    seed: int = 0,
    per_class: int = 40,
    earlier: Training = ENCODING,
    training: Training = TUNING,
) -> dict[str, representation.Embedding]:
    """One Greek letter's images before and after HCMM's merge of the second task, embedded: a picture by strength.

    The letter is of the first task; "previous" is the network that has learned it.
    """
    stream = letters(seed, per_class=per_class)
    model, first = encoder(stream, per_class, earlier, seed=seed), stream[0]
    found = {}
    for name in strengths:
        result = corrected(model, replace(stream, tasks=stream.tasks[:2]), name, seed, training)
        x, layer = first.prepare(first.train.x), "encoder.projection"
        both = [representation.features(result.model, x, layer, weights=w) for w in result.weights]
        found[name] = representation.embed({"previous": both[0], "merged": both[1]}, first.train.y, first.classes[:1])
    return found


def gap(points: "pd.DataFrame") -> float:
    """How far apart two models' points lie in a plane: the distance of their centres, in mean radii of the two clouds.

    `points` are those of `representation.embed`, under two models.
    """
    one, other = (rows[["x", "y"]].to_numpy() for _, rows in points.groupby("model", sort=False))
    radius = np.mean([np.linalg.norm(cloud - cloud.mean(0), axis=1).mean() for cloud in (one, other)])
    return float(np.linalg.norm(one.mean(0) - other.mean(0)) / radius)


def moved(features: Tensor, size: float, by: str = "shift", seed: int = 1, **options: Any) -> representation.Embedding:
    """Features of one class (N, F) and a copy of them, moved, embedded together: a picture of a known distance.

    `by` "shift" moves all alike, in a direction that `seed` draws; "noise" moves each in a direction of its own; both
    by `size` times the root mean squared distance of an example to their centre. `options` go to `embed`.
    """
    if by not in ("shift", "noise"):
        raise ValueError(f"by: {by!r} is unknown; choose one of shift, noise")
    spread = (features - features.mean(0)).square().mean(1).sqrt().mean()
    count = 1 if by == "shift" else len(features)
    drawn = torch.randn(count, features.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    way = size * spread * drawn / drawn.square().mean(1, keepdim=True).sqrt()
    both = {"one": features, "moved": features + way.to(features.dtype)}
    return representation.embed(both, torch.zeros(len(features), dtype=torch.int64), **options)


def against_none(correction: "pd.DataFrame") -> "pd.DataFrame":
    """Of `correction`, a row for each strength and seed beside the run without a correction.

    Columns: strength, seed, new and old, means over tasks, accuracy, at the end; and the same with "_none".
    """
    by = ["strength", "seed"]
    table: Any = correction.groupby(by, sort=False)[["new", "old"]].mean()
    end: Any = correction[correction["task"] == correction["task"].max()]
    table = table.assign(accuracy=end.set_index(by)["accuracy"]).reset_index()
    none = table[table["strength"] == "none"].drop(columns="strength")
    return table[table["strength"] != "none"].merge(none, on="seed", suffixes=("", "_none"))


def letters(seed: int = 0, tasks: int = 4, per_class: int = 40) -> Stream:
    """Forty-eight Greek letters at 16 x 16 pixels in tasks of equal size, in an order that the seed draws."""
    full = data.glyphs("greek", per_class=per_class, size=16, jitter=1.5, seed=seed)
    return data.split(replace(full, normalize=_latin(seed, per_class)[0].normalize), tasks, order=seed)


def encoder(stream: Stream, per_class: int = 40, training: Training = ENCODING, *, seed: int = 0) -> nn.Module:
    """An encoder trained on Latin letters, under a frozen head of the prototypes of three other images a class."""
    trained = _run(_latin(seed, per_class), models.encoder, None, None, training, seed).model
    body = trained.get_submodule("encoder").eval()
    shown = data.glyphs("greek", per_class=3, size=16, jitter=1.5, seed=seed + 10_000).train
    return models.with_prototypes(body, models.prototypes(body, stream[0].prepare(shown.x), shown.y))


def corrected(model: nn.Module, stream: Stream, strength: str, seed: int = 0, training: Training = TUNING) -> Result:
    """HCMM on a stream of letters, from a model of `encoder`, with one of `STRENGTHS` of the correction."""
    return _run(stream, model, None, HCMM(alpha=0.5, **STRENGTHS[strength]), training, seed)


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


def _run(stream: Stream, model: Any, learner: Any, consolidation: Any, training: Training, seed: int) -> Result:
    return run(stream, model, learner, consolidation, training, seed=seed, device="cpu", progress=False)


def _latin(seed: int, per_class: int) -> Stream:
    return data.split(data.glyphs("latin", per_class=per_class, size=16, seed=seed), 1)


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

"""Tables and pictures that are read off networks and studies."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clkit import normalization, representation, weights
from clkit.experiments.statistics import paired_difference
from clkit.training import Result, Training
from clkit.weights import Weights
from studies.representations.networks import (
    ENCODING,
    TASKS,
    TUNING,
    Pair,
    corrected,
    encoder,
    letters,
)

if TYPE_CHECKING:
    import pandas as pd


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

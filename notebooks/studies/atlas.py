"""The merging atlas: eight networks fine-tuned from one start, and every merge of `merging.MERGES` on them.

The tasks are eight scripts of `data.glyphs`, ten characters each, the task given. The start is a perceptron that has
seen all eighty characters in one font; its head is frozen from then on, as CLIP's is in the papers (Ilharco et al.,
arXiv 2212.04089), so that merging is about the body alone. A fifth of the training data is held out: options of a
merge are chosen on it, and reported on the test data.

```python
made = atlas.zoo(seed=0)
made.accuracy(made.merge("ties", "independent", scale=1.5)).mean()
```
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from clkit import curvature, data, models, weights
from clkit.consolidation import SFA, Merging
from clkit.data import Examples, Stream
from clkit.evaluation import evaluate
from clkit.learners import Joint, Learner
from clkit.merging import MERGES
from clkit.training import Training, run
from clkit.weights import Weights

if TYPE_CHECKING:
    import pandas as pd

TASKS = tuple(data.SCRIPTS)
TRAININGS = ("independent", "sequential")
STARTS = ("pretrained", "random", "apart")
SEEDS = range(5)
MASKED = "emr, masked"  # EMR as its paper deploys it: a network for each task, made of one vector and a mask
RELEASED = "opcm, released"  # OPCM with the projection of its released code, from which its published numbers come
NAMES = (*MERGES, MASKED, RELEASED)
PER_CLASS, HELD_OUT = 80, 16  # training examples of a character, and how many of them options are chosen on
ADAM = Training(6, 32, 0.001, optimizer="adamw", labels="task", augment=False)
EARLIER = Training(15, 32, 0.001, optimizer="adamw", augment=False)
MEASURED = 256  # examples of a task that Fisher information and Gram matrices are measured on
KNOBS = ("scale", "density", "t", "alpha", "shrink", "whole")

SUMS = (0.05, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # scales of a sum of task vectors
MEANS = (0.3, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # scales of what replaces their mean
LINE = (0.1, 0.3, 0.5, 0.7, 0.9)


def _each(**values: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


# Options without tuning, from the papers where they name some, then those to choose from on held-out data.
UNTUNED: Mapping[str, Mapping[str, Any]] = {
    "task_arithmetic": {"scale": 0.3},
    "breadcrumbs": {"scale": 0.3},
    "dare": {"density": 0.1, "scale": 0.3},
    "magmax": {"scale": 0.5},
}
SEARCHED: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "interpolate": _each(t=LINE),
    "slerp": _each(t=LINE),
    "wise_ft": _each(alpha=LINE),
    "task_arithmetic": _each(scale=SUMS),
    "model_stock": _each(whole=(False, True)),
    "ties": _each(density=(0.05, 0.1, 0.2, 0.5, 1.0), scale=MEANS),
    "breadcrumbs": _each(density=(0.143, 0.5, 0.9), scale=SUMS),
    "dare": _each(density=(0.05, 0.1, 0.2, 0.5, 1.0), scale=SUMS),
    "dare_ties": _each(density=(0.1, 0.2, 0.5, 1.0), scale=MEANS),
    "della": _each(density=(0.1, 0.2, 0.5, 0.9), scale=MEANS),
    "magmax": _each(scale=MEANS),
    "pcb": _each(density=(0.05, 0.2, 0.5, 1.0), scale=(0.5, 1.0, 1.5, 2.0)),
    "regmean": _each(shrink=(0.1, 0.5, 0.9, 1.0)),
    "iso_c": _each(scale=(*MEANS, 2.5, 3.0, 3.5, 4.0, 5.0)),
    "tsv": _each(scale=(*MEANS, 2.5, 3.0)),
    "opcm": _each(alpha=(0.0, 0.2, 0.5, 0.8)),
    RELEASED: _each(alpha=(0.0, 0.2, 0.5, 0.8)),
}


@dataclass(frozen=True, eq=False)
class Zoo:
    """Networks fine-tuned on a task each, and what merges may want to know of them.

    - `stream`: the tasks, with their test data; `held_out`: the same with held-out training data in their place
    - `model`: of the networks' architecture; `base`: the start, from which task vectors are taken
    - `networks`: the weights trained on every task, "independent", all from the base, and "sequential", each from the
      last one's
    - `starts`: what each of the independent networks began with, the base but for `start="apart"`
    - `importances`, `grams`: Fisher information and Gram matrices of each network on its own task, by training
    """

    stream: Stream
    held_out: Stream
    model: nn.Module
    base: Weights
    networks: Mapping[str, Sequence[Weights]]
    importances: Mapping[str, Sequence[Weights]]
    grams: Mapping[str, Sequence[Weights]]
    seed: int

    def merge(self, name: str, training: str = "independent", **options: Any) -> list[Weights]:
        """Merges the networks by a row of `MERGES`: the weights to use for each of the tasks.

        They are one and the same for all tasks, but for "emr, masked". As in the consolidation `Merging`, a merge of
        two goes through the networks in order, the merged one first, and a merge of one takes the last network.
        """
        ws = self.networks[training]
        if name == MASKED:
            return [MERGES["emr"](ws, base=self.base, task=i) for i in range(len(ws))]
        if name == RELEASED:
            name, options = "opcm", options | {"projection": "released"}
        row = MERGES[name]
        if row.needs == "score":
            options["score"] = lambda w: self.accuracy([w] * len(ws), held_out=True).mean()
        elif row.needs:
            options[row.needs] = getattr(self, row.needs)[training]
        if row.random:
            options.setdefault("seed", self.seed)
        if row.arity == 2:
            merged = ws[0]
            for w in ws[1:]:
                merged = row([merged, w], base=self.base, **options)
            return [merged] * len(ws)
        return [row(ws[-1:] if row.arity == 1 else ws, base=self.base, **options)] * len(ws)

    def accuracy(self, merged: Sequence[Weights], *, held_out: bool = False) -> np.ndarray:
        """Accuracy on each of the tasks, with weights for each of them, on test or held-out data."""
        found = np.empty(len(merged))
        for group in {id(w): w for w in merged}.values():
            places = [i for i, w in enumerate(merged) if w is group]
            weights.set_weights(self.model, group)
            found[places] = evaluate(self.model, self.only(places, held_out=held_out)).masked
        return found

    def only(self, tasks: Sequence[int], *, held_out: bool = False) -> Stream:
        """The stream of some of the tasks, with test or with held-out data to be judged by."""
        stream = self.held_out if held_out else self.stream
        return replace(stream, tasks=tuple(replace(stream[i], index=k) for k, i in enumerate(tasks)))

    def vectors(self, training: str = "independent") -> list[dict[str, torch.Tensor]]:
        """The task vectors w - base."""
        return [weights.sub(w, self.base) for w in self.networks[training]]


def scripts(seed: int = 0, per_class: int = PER_CLASS) -> tuple[Stream, Stream, Stream]:
    """Eight scripts, ten characters of each drawn by the seed, as tasks in an order drawn by it, too.

    Three streams of the same classes: the tasks; the tasks with training data held out in the place of the test data;
    and one task of all eighty characters in one font, to begin with.
    """
    rng = np.random.default_rng(seed)
    characters, names = "", rng.permutation(TASKS).tolist()
    for script in names:
        known = [c for c in data.glyphs(script, per_class=1, size=8).classes if c not in characters]
        characters += "".join(rng.choice(known, 10, replace=False))
    whole = data.glyphs(characters=characters, size=16, per_class=per_class, seed=seed)
    plain = data.glyphs(characters=characters, size=16, per_class=12, fonts="sans", jitter=0.5, seed=seed + 1000)
    place = torch.arange(len(whole.train)) % per_class  # a class's rows follow each other, its fonts in turn
    held = place >= per_class - max(1, per_class * HELD_OUT // PER_CLASS)
    kept, apart = (Examples(whole.train.x[rows], whole.train.y[rows]) for rows in (~held, held))
    streams = []
    for test in (whole.test, apart):
        stream = data.split(replace(whole, train=kept, test=test), len(TASKS), scenario="task")
        named = (replace(task, name=name) for task, name in zip(stream, names, strict=True))
        streams.append(replace(stream, name="scripts", tasks=tuple(named)))
    return *streams, data.split(replace(plain, normalize=whole.normalize), 1)


def zoo(
    seed: int = 0,
    start: str = "pretrained",
    *,
    model: Any = None,
    training: Training = ADAM,
    earlier: Training = EARLIER,
    per_class: int = PER_CLASS,
) -> Zoo:
    """Trains the networks of one seed, on the CPU.

    `start`: "pretrained"; "random", the network as initialised; or "apart", where every independent network has an
    initialisation of its own and the base is another one. `model` is a factory, by default a perceptron with two layers
    of 256.
    """
    if start not in STARTS:
        raise ValueError(f"start: {start!r} is unknown; choose one of {', '.join(STARTS)}")
    factory = model or partial(models.mlp, hidden=(256, 256))
    stream, held_out, plain = scripts(seed, per_class)
    if start == "pretrained":
        first = run(plain, factory, None, None, earlier, seed=seed, device="cpu", progress=False).weights[0]
    else:
        first = weights.get_weights(factory(stream, seed=seed))
    net = _frozen(factory, stream, first, seed)
    common = {"seed": seed, "device": "cpu", "progress": False}
    alone = Merging("average", training="independent")
    networks: dict[str, Sequence[Weights]] = {}
    if start == "apart":
        networks["independent"] = [
            run(replace(stream, tasks=(replace(task, index=0),)),
                _frozen(factory, stream, weights.get_weights(factory(stream, seed=seed + 100 + task.index)), seed),
                None, None, training, **common).trained[0]
            for task in stream
        ]  # fmt: skip
    else:
        networks["independent"] = run(stream, net, Learner(), alone, training, **common).trained
    networks["sequential"] = run(stream, net, Learner(), None, training, **common).trained
    known = {kind: [_known(net, w, stream, i) for i, w in enumerate(ws)] for kind, ws in networks.items()}
    importances, grams = ({kind: [pair[k] for pair in pairs] for kind, pairs in known.items()} for k in (0, 1))
    return Zoo(stream, held_out, copy.deepcopy(net), first, networks, importances, grams, seed)


def settings(name: str) -> list[Mapping[str, Any]]:
    """The options of a merge that are tried: first those without tuning, then those to choose from."""
    return [UNTUNED.get(name, {}), *SEARCHED.get(name, [])]


def merges(seed: int, names: Sequence[str] = NAMES, **made: Any) -> list[dict[str, Any]]:
    """Every merge at all its settings, independent and sequential: a row each.

    Columns: training, method, untuned (whether the options are those without tuning), the options' numbers (NaN where
    they are not given), held_out and acc, the mean accuracies over tasks on held-out and on test data. `made` is passed
    to `zoo`.
    """
    one, rows = zoo(seed, **made), []
    for training, name in product(TRAININGS, names):
        for place, options in enumerate(settings(name)):
            merged = one.merge(name, training, **options)
            row = {"training": training, "method": name, "untuned": place == 0}
            row |= {knob: float(options.get(knob, "nan")) for knob in KNOBS}
            for part, held_out in (("held_out", True), ("acc", False)):
                row[part] = round(float(one.accuracy(merged, held_out=held_out).mean()), 5)
            rows.append(row)
    return rows


def chosen(table: "pd.DataFrame", by: Sequence[str] = ("seed", "training", "method")) -> "pd.DataFrame":
    """Of `merges`, the rows with the options that did best on held-out data, the first of equals."""
    return table.loc[table.groupby(list(by), sort=False).held_out.idxmax()].reset_index(drop=True)


def references(seed: int, **made: Any) -> list[dict[str, Any]]:
    """What merges are compared with: reference, acc, the mean accuracy over tasks, and tasks, that by task.

    - "start", the base; "each its own", every independently fine-tuned network on its own task: eight networks
    - "joint", one network trained on all tasks together; "one after the other", the last sequential network
    - "SFA", merged with the previous task's weights four times a task, while it trains (arXiv 2501.05559)
    """
    one = zoo(seed, **made)
    n = len(one.stream)
    weights.set_weights(one.model, one.base)
    training, common = made.get("training", ADAM), {"seed": seed, "device": "cpu", "progress": False}
    found = {
        "start": one.accuracy([one.base] * n),
        "each its own": one.accuracy(one.networks["independent"]),
        "joint": run(one.stream, one.model, Joint(), None, training, **common).masked[-1],
        "one after the other": one.accuracy([one.networks["sequential"][-1]] * n),
        "SFA": run(one.stream, one.model, Learner(), SFA(0.25, 0.5), training, **common).masked[-1],
    }
    return [
        {"reference": name, "acc": round(float(accuracy.mean()), 5), "tasks": accuracy.round(4).tolist()}
        for name, accuracy in found.items()
    ]


def above_joint(table: "pd.DataFrame") -> "pd.Series":
    """By seed, how far the one network of a merge that does best on held-out data is above joint training.

    `table` has the rows of `chosen` and of `references`, which were not chosen among.
    """
    rows: Any = table[table.held_out.notna() & ~table.method.isin([MASKED, "joint"])]
    top = rows.loc[rows.groupby("seed").held_out.idxmax()].set_index("seed").acc
    return (top - table[table.method == "joint"].groupby("seed").acc.mean()).dropna()


def starts(seed: int, start: str) -> dict[str, float]:
    """Negative controls: the average and task arithmetic of networks from one of STARTS.

    Columns: own, the mean accuracy of the fine-tuned networks on their tasks, average, and task_arithmetic, its scale
    chosen on held-out data.
    """
    one = zoo(seed, start=start)
    merged = {"own": one.networks["independent"], "average": one.merge("average")}
    sums = [one.merge("task_arithmetic", **options) for options in settings("task_arithmetic")]
    merged["task_arithmetic"] = max(sums, key=lambda tried: one.accuracy(tried, held_out=True).mean())
    return {name: float(one.accuracy(ws).mean()) for name, ws in merged.items()}


def geometry(seed: int) -> list[dict[str, Any]]:
    """How the task vectors of one start lie to each other, independent and sequential: `relations`, a row for each."""
    one = zoo(seed)
    return [{"training": training} | relations(one.vectors(training)) for training in TRAININGS]


def relations(vectors: Sequence[Weights]) -> dict[str, Any]:
    """How n task vectors lie to each other: the means over pairs of cosine and agree, length, and matrix.

    - agree: the share of entries at which two vectors have the same sign, of those where both move
    - length: of the mean task vector, relative to the mean length; 1 / sqrt(n) for orthogonal ones of equal length
    - matrix: the cosines of all pairs (n, n)
    """
    flat = torch.stack([torch.cat([t.flatten() for t in v.values()]) for v in vectors]).double()
    lengths, signs = flat.norm(dim=1), flat.sign()
    cosines = flat @ flat.T / torch.outer(lengths, lengths)
    agree = (1 + signs @ signs.T / (signs.abs() @ signs.abs().T)) / 2
    pairs = tuple(torch.triu_indices(len(flat), len(flat), 1))
    return {
        "cosine": float(cosines[pairs].mean()),
        "agree": float(agree[pairs].mean()),
        "length": float(flat.mean(0).norm() / lengths.mean()),
        "matrix": cosines.numpy().round(4).tolist(),
    }


def _frozen(factory: Any, stream: Stream, start: Weights, seed: int) -> nn.Module:
    """A network with these weights, whose head does not train."""
    net: Any = factory(stream, seed=seed)
    weights.set_weights(net, start)
    for parameter in net.linear.parameters():
        parameter.requires_grad_(False)
    return net


def _known(net: nn.Module, w: Weights, stream: Stream, task: int) -> tuple[Weights, Weights]:
    """Fisher information, labels drawn from the task's own classes, and Gram matrices of a network on its task."""
    generator = torch.Generator().manual_seed(task)
    rows = torch.randperm(len(stream[task].train), generator=generator)[:MEASURED]
    x = stream[task].prepare(stream[task].train.x[rows])
    space = torch.zeros(len(stream.classes), dtype=torch.bool)
    space[list(stream[task].classes)] = True
    weights.set_weights(net, w)
    return curvature.fisher(net, x, space=space, generator=generator), curvature.grams(net, w, x)

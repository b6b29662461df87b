"""SFA's experiments as grids of runs."""

import functools
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from clkit import data, models, weights
from clkit.consolidation import SFA, Cosine, Drift, Merging, Plateau, Velocity
from clkit.data import Stream
from clkit.experiments import Comparison, Method
from clkit.experiments.pages import Page
from clkit.experiments.statistics import Difference, paired_difference
from clkit.learners import EWC, L2, LEARNERS, DataBuffer, Joint, Learner, OnlineEWC
from clkit.training import Result, Training, run
from studies.named import dataset

if TYPE_CHECKING:
    import pandas as pd

PS = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.96, 1.0)
BETAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
EWC_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # more diverges at a rate of 0.1
SHARES = (0.01, 0.05, 0.1)
HEADS = ("masked", "shared", "plain")
EVEN_ODD = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)
LETTERS = "latin+armenian"  # more than a hundred classes once look-alikes are dropped
EARLIER = "cyrillic+georgian"  # what the small transformer has learned before them


def averaging(ps: Sequence[float], betas: Sequence[float], **options: Any) -> dict[str, Method]:
    """Fine-tuning with SFA at every p and beta; p = 1 is WiSE-FT after every task."""
    return {f"SFA p={p:g} β={b:g}": Method(Learner(), SFA(p, b, **options)) for p in ps for b in betas}


def pulling(strengths: Sequence[float] = STRENGTHS, ewc: Sequence[float] = EWC_STRENGTHS) -> dict[str, Method]:
    """L2 and EWC at every strength."""
    made = {f"L2 λ={s:g}": Method(L2(s)) for s in strengths}
    return made | {f"EWC λ={s:g}": Method(EWC(s)) for s in ewc}


def replaying(shares: Sequence[float] = SHARES) -> dict[str, Method]:
    """Fine-tuning with a share of every earlier task's data, mixed in in proportion or as half of every batch."""
    return {
        f"buffer {s:.0%}, {mixing}": Method(DataBuffer(s, mixing)) for s in shares for mixing in ("concatenate", "half")
    }


def even_odd(name: str = "digits", head: str = "masked", *, limit: int | None = None) -> Stream:
    """The even digits, then the odd ones, of "digits" or "mnist".

    `head` "masked": ten outputs, a task's own given (task-incremental); "plain": ten outputs, all compete; "shared":
    five outputs for both, the label is half the digit, rounded down (domain-incremental: the strongest conflict).
    """
    if head not in HEADS:
        raise ValueError(f"head: {head!r} is unknown; choose one of {', '.join(HEADS)}")
    scenario = "task" if head == "masked" else "class"
    stream = data.split(dataset(name, limit), 2, order=EVEN_ODD, scenario=scenario)
    return data.shared_head(stream) if head == "shared" else stream


def frontier(name: str = "digits", head: str = "masked", profile: str = "fast") -> Comparison:
    """Old against new accuracy over every knob: p and beta of SFA, the strengths of L2 and EWC, the buffer's share."""
    limit = None if name == "digits" or profile == "paper" else 300
    ps = PS if name == "digits" and head != "plain" else (0.05, 0.25, 1.0)
    words = f"{name}, even then odd, {head} head" + (f", {limit} images a class" if limit else "")
    methods = {"fine-tuning": Method(Learner()), "joint": Method(Joint())}
    methods |= averaging(ps, BETAS) | pulling() | replaying()
    labels = "task" if head == "masked" else "all"
    training = Training(epochs=16 if name == "digits" else 6, batch=32, lr=0.1, labels=labels)
    streams = {words: lambda seed: even_odd(name, head, limit=limit)}
    return Comparison(streams, {"mlp 128-64": small_mlp}, methods, training, range(5), ends)


def adaptive(head: str = "shared") -> Comparison:
    """When to merge: SFA's fixed p against triggers that see the weights, the loss, the speed or the gradient."""
    triggers: dict[str, Any] = {}
    for limit in (0.1, 0.15, 0.2, 0.25, 0.3):
        triggers[f"drift {limit:g}"] = Drift(40, limit)
    for tolerance in (0.02, 0.05, 0.1, 0.2, 0.3):
        triggers[f"plateau {tolerance:g}"] = Plateau(40, tolerance)
    for start, longest in ((0.05, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 1.0)):
        triggers[f"velocity {start:g}"] = Velocity(100, start, start / 4, longest)
    for limit in (-0.2, -0.1, -0.05, 0.0, 0.05):
        triggers[f"cosine {limit:g}"] = Cosine(40, limit)
    methods = {"fine-tuning": Method(Learner())}
    for beta in (0.2, 0.5):
        methods |= averaging((0.02, 0.05, 0.1, 0.15, 0.25, 0.33, 0.5, 1.0), (beta,))
        methods |= {f"{n} β={beta:g}": Method(Learner(), SFA(t, beta)) for n, t in triggers.items()}
    return replace(frontier("digits", head), methods=methods)


def similarity() -> Comparison:
    """The frequency-retention curve: p from 0.1 to 1 over two tasks that are the more alike the smaller their angle.

    The digits upright, then turned by an angle, or with a share of their pixels permuted: one head for both.
    """
    streams: dict[str, Any] = {f"rotated by {angle}": partial(_rotated, (0, angle)) for angle in (0, 30, 60, 90, 180)}
    for share in (0.25, 0.5, 1.0):
        streams[f"{share:.0%} of pixels permuted"] = partial(_permuted, 2, share)
    methods = {"fine-tuning": Method(Learner())} | averaging([i / 10 for i in range(1, 11)], (0.5,))
    return Comparison(streams, {"mlp 128-64": small_mlp}, methods, Training(8, 32, 0.1), range(3), ends)


def long() -> Comparison:
    """A hundred tasks, whose course has 20 and 50: the digits, another permutation of half of their pixels in each."""
    streams = {"100 tasks": partial(_permuted, 100, 0.5)}
    methods = {
        "fine-tuning": Method(Learner()),
        "SFA p=0.25 β=0.5": Method(Learner(), SFA(0.25, 0.5)),
        "SFA p=0.25 β=0.2": Method(Learner(), SFA(0.25, 0.2)),
        "SFA p=1 β=0.5": Method(Learner(), SFA(1.0, 0.5)),
        "SFA p=1 β=1-1/k": Method(Learner(), SFA(1.0, "equal")),
        "online EWC": Method(OnlineEWC(1.0, gamma=0.9)),
        "buffer 5%, concatenate": Method(DataBuffer(0.05)),
    }
    return Comparison(streams, {"mlp 128-64": small_mlp}, methods, Training(3, 32, 0.1), range(2), course)


def checkpoints() -> Comparison:
    """Several earlier checkpoints as the anchor, against one with other weights, and against buffers of 5 and 10 %."""
    streams = {"10 tasks": partial(_permuted, 10, 0.5)}
    methods: dict[str, Method] = {"fine-tuning": Method(Learner()), "joint": Method(Joint())}
    for p in (0.25, 1.0):
        for beta in (0.2, 0.5):
            for anchor in ("previous", "uniform", "recency"):
                methods[f"SFA p={p:g} β={beta:g}, {anchor}"] = Method(Learner(), SFA(p, beta, anchor))
        methods[f"SFA p={p:g} β=1-1/k, previous"] = Method(Learner(), SFA(p, "equal"))
        methods[f"SFA p={p:g} β=1-1/k, uniform"] = Method(Learner(), SFA(p, "equal", "uniform"))
        each = SFA(p, 0.6, (0.3, 0.2, 0.1))
        methods[f"SFA p={p:g}, 0.3 + 0.2 + 0.1 of the last three"] = Method(Learner(), each)
    methods |= replaying((0.05, 0.1))
    return Comparison(streams, {"mlp 128-64": small_mlp}, methods, Training(8, 32, 0.1), range(3), course)


def conflict() -> Comparison:
    """Two tasks on the same images and the same head, from independent labels to exact contradiction.

    Even or odd, then at least five or not; with the share c of the second task's labels the opposite of the first's.
    "marked" images carry a bright edge in the second task, so that a network that can tell the two exists.
    """
    streams = {
        f"c={c:g}{', marked' if marked else ''}": partial(_conflicting, c, marked)
        for marked in (False, True)
        for c in (0.0, 0.25, 0.5, 0.75, 1.0)
    }
    methods = {"fine-tuning": Method(Learner()), "L2 λ=0.1": Method(L2(0.1)), "EWC λ=30": Method(EWC(30.0))}
    methods |= averaging((0.25, 1.0), (0.2, 0.5)) | {"buffer 10%, half": Method(DataBuffer(0.1, "half"))}
    return Comparison(streams, {"mlp 128-64": small_mlp}, methods, Training(16, 32, 0.1), range(3), ends)


def parts() -> Comparison:
    """What the paper leaves open: optimizer state, schedule, first task, final merge, head; on even then odd."""
    adam, heavy = {"optimizer": "adamw", "lr": 0.002}, {"momentum": 0.9, "lr": 0.02}
    base = frontier("digits", "masked")
    methods: dict[str, Method] = {}
    for p in (0.1, 0.25, 0.96, 1.0):
        rule = SFA(p, 0.5)
        methods[f"p={p:g}"] = Method(Learner(), rule)
        methods[f"p={p:g}, cosine schedule"] = Method(Learner(), rule, replace(base.training, schedule="cosine"))
        if p in (0.1, 0.96):  # elsewhere the interval divides the task and the last merge comes anyway
            methods[f"p={p:g}, no final merge"] = Method(Learner(), replace(rule, final=False))
        methods[f"p={p:g}, head as trained"] = Method(Learner(), replace(rule, own=("linear.",)))
        methods[f"p={p:g}, untouched as trained"] = Method(Learner(), replace(rule, untouched="keep"))
        for name, settings in (("Adam", adam), ("momentum", heavy)):
            own = replace(base.training, **settings)
            methods[f"p={p:g}, {name}, state kept"] = Method(Learner(), rule, own)
            methods[f"p={p:g}, {name}, state reset"] = Method(Learner(), replace(rule, optimizer="reset"), own)
    return replace(base, methods=methods)


def streams(name: str = "letters", profile: str = "fast") -> Comparison:
    """Twenty tasks of five classes, the task given: rendered letters, or CIFAR-100, with a small transformer.

    The transformer has learned something else before (other scripts; CIFAR-10), as the paper's have. Knobs are single
    values and were not tuned here; penalties are in Adam's gradient, as is usual. "paper" is
    CIFAR-100 at its full size with a larger one that has not.
    """
    adam = Training(6, 32, 0.001, optimizer="adamw", labels="task", augment=False)
    methods = {
        "fine-tuning": Method(Learner()),
        "joint": Method(Joint()),
        "SFA p=0.25 β=0.5": Method(Learner(), SFA(0.25, 0.5)),
        "SFA p=0.25 β=0.2": Method(Learner(), SFA(0.25, 0.2)),
        "SFA p=1 β=0.5": Method(Learner(), SFA(1.0, 0.5)),
        "SFA p=1 β=0.2": Method(Learner(), SFA(1.0, 0.2)),
        "L2": Method(L2(0.01)),
        "online EWC": Method(OnlineEWC(30.0, samples=200)),
        "task arithmetic": Method(Learner(), Merging("task_arithmetic", {"scale": 0.3}, training="independent")),
        "TIES": Method(Learner(), Merging("ties", training="independent")),
        "buffer 5%, concatenate": Method(DataBuffer(0.05)),
        "buffer 10%, concatenate": Method(DataBuffer(0.1)),
    }
    if profile == "paper":
        vit = partial(models.vit, patch=4, dim=192, depth=6, heads=6)
        whole = {"cifar100, 20 tasks": partial(_twenty, "cifar100", None)}
        return Comparison(
            whole, {"vit 192 x 6": vit}, methods, replace(adam, epochs=20, augment=True), range(5), course
        )
    limit = None if name == "letters" else 60
    if name != "letters":
        left = ("L2", "SFA p=1 β=0.2", "joint", "task arithmetic", "buffer 5%, concatenate")
        methods = {n: m for n, m in methods.items() if n not in left}
        adam = replace(adam, epochs=4)
    words = f"{name}, 20 tasks" + (f", {limit} images a class" if limit else "")
    seeds = range(3) if name == "letters" else range(2)
    chosen = {words: partial(_twenty, name, limit)}
    return Comparison(
        chosen, {"vit 48 x 2, pretrained": partial(pretrained, source=name)}, methods, adam, seeds, course
    )


def small_mlp(stream: Stream, *, seed: int = 0) -> nn.Module:
    """The perceptron of the small theory test: 128 and 64 hidden units."""
    return models.mlp(stream, hidden=(128, 64), seed=seed)


def pretrained(stream: Stream, source: str = "letters", *, seed: int = 0) -> nn.Module:
    """A small transformer that has learned other scripts, or CIFAR-10, with a fresh head for `stream`."""
    net = _vit(stream, seed=seed)
    body = {n: t for n, t in _body(source).items() if not n.startswith("linear.")}
    weights.set_weights(net, weights.get_weights(net) | body)
    return net


_vit = partial(models.vit, patch=4, dim=48, depth=2)


@functools.cache
def _body(source: str) -> weights.Weights:
    earlier = dataset("cifar10", 400) if source == "cifar100" else data.glyphs(EARLIER, per_class=40, size=16)
    adam = Training(8, 32, 0.002, optimizer="adamw", schedule="cosine", augment=False)
    return run(data.split(earlier, 1), _vit, training=adam, device="cpu", progress=False).weights[0]


def stored(page: Page, grid: Comparison, name: str) -> "pd.DataFrame":
    """The runs of a grid with their knobs, computed once and then read from the files of a notebook's page."""
    return knobs(page.results(grid.run, grid.config, f"{name}-runs", commit=True), grid)


def knobs(table: "pd.DataFrame", grid: Comparison) -> "pd.DataFrame":
    """A table of runs with what each method is set to: kind, p, beta, strength, share; blank where it has none."""
    rows: dict[str, dict[str, Any]] = {}
    rules = {rule: name for name, rule in LEARNERS.items()}
    for name, method in grid.methods.items():
        parts = [part for part in (method.learner, method.consolidation) if part is not None]
        settings = {f.name: getattr(part, f.name) for part in parts for f in fields(part)}  # type: ignore[arg-type]
        found = {k: settings.get(k, float("nan")) for k in ("p", "beta", "strength", "share")}
        kind = "SFA" if isinstance(method.consolidation, SFA) else rules[type(method.learner)]
        rows[name] = {"kind": kind} | {k: v if isinstance(v, int | float) else float("nan") for k, v in found.items()}
    import pandas as pd

    return table.join(pd.DataFrame.from_dict(rows, orient="index"), on="method")


def lines(table: "pd.DataFrame") -> "pd.DataFrame":
    """A table with knobs, with the line of a figure that each row lies on: SFA at one p, WiSE-FT for p = 1, others."""
    share = {"concatenate": "buffer", "half": "buffer, half of a batch"}

    def name(row: Any) -> str:
        if row.kind == "data buffer":
            return share[row.method.rpartition(", ")[2]]
        return row.kind if row.kind != "SFA" else "WiSE-FT (p = 1)" if row.p == 1 else f"SFA p = {row.p:g}"

    return table.assign(line=[name(row) for row in table.itertuples()])


def retained(table: "pd.DataFrame", new: float = 0.95, *, by: str = "line") -> "pd.DataFrame":
    """Accuracy on the old tasks where that on the new one is `new`: interpolated along each line's knob, seed by seed.

    A row a line and seed, with the column `old`, of lines that reach `new` in every seed. Lines are compared at equal
    plasticity, so that no single setting of a knob decides.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    groups: Any = table.groupby([by, "seed"], sort=False)
    for (line, seed), one in groups:
        one = one.sort_values("new")
        if len(one) > 1 and one.new.min() <= new <= one.new.max():
            rows.append({by: line, "seed": seed, "old": float(np.interp(new, one.new, one.old))})
    found: Any = pd.DataFrame(rows, columns=[by, "seed", "old"])
    return found[found.groupby(by)["seed"].transform("count") == table["seed"].nunique()].reset_index(drop=True)


def advantage(kept: "pd.DataFrame", a: str, b: str, *, level: float = 0.95) -> Difference:
    """How much more line `a` retains than line `b`, seed by seed, with Student's paired t interval at `level`.

    `kept` is what `retained` gives.
    """
    return paired_difference(kept, a, b, "old", column="line", level=level)


def ends(result: Result) -> dict[str, float]:
    """Two tasks after the second: accuracy on the old and the new one, the steps it took to learn that, the merges.

    `steps` is the first step of the last task at which the mean loss of ten steps is below 0.3, else all of them; to be
    compared between rules whose loss is the task's own.
    """
    loss = result.training_loss[-1]
    smooth = np.convolve(loss, np.ones(10) / 10, "valid")
    below = np.flatnonzero(smooth < 0.3)
    return {
        "old": float(result.accuracy[-1, :-1].mean()),
        "new": float(result.accuracy[-1, -1]),
        "before": float(result.accuracy[0, 0]),
        "steps": int(below[0] + 10) if len(below) else len(loss),
        "merges": len(result.reports[-1].get("steps", [])),
    }


def course(result: Result) -> dict[str, Any]:
    """The course of a long stream: after each task the accuracy on the first, the mean over those seen, the newest.

    `distance` is how far the deployed weights have come from the first task's, relative to their length.
    """
    a, first = result.accuracy, result.weights[0]
    length = weights.norm(first)
    return {
        "first": a[:, 0].tolist(),
        "seen": [float(a[t, : t + 1].mean()) for t in range(len(a))],
        "newest": np.diagonal(a).tolist(),
        "distance": [weights.norm(weights.sub(w, first)) / length for w in result.weights],
    }


def _rotated(angles: Sequence[float], seed: int) -> Stream:
    return data.rotated(data.digits(), angles)


def _permuted(tasks: int, share: float, seed: int) -> Stream:
    return data.permuted(data.digits(), tasks, share=share, seed=seed)


def _conflicting(conflict: float, marked: bool, seed: int) -> Stream:
    return data.conflicting(data.digits(), conflict=conflict, marked=marked, seed=seed)


def _twenty(name: str, limit: int | None, seed: int) -> Stream:
    if name != "letters":
        return data.split(dataset(name, limit), 20, order=seed, scenario="task")
    letters = data.glyphs(LETTERS, per_class=40, size=16)
    order = np.random.default_rng(seed).permutation(len(letters.classes))[:100].tolist()
    return data.split(letters, 20, order=order, scenario="task")

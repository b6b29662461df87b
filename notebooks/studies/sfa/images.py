"""SFA's experiments on images: streams, networks, what is measured, and studies of single merges."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from clkit import checks, data, landscape, models, weights
from clkit.consolidation import SFA, Context, Merged
from clkit.data import Stream
from clkit.experiments import Comparison, Method, grid
from clkit.learners import EWC, L2, DataBuffer, Joint, Learner, OnlineEWC
from clkit.training import Result, Training, run
from studies.named import dataset, drawn

if TYPE_CHECKING:
    import pandas as pd

Head = Literal["masked", "shared", "plain"]
LETTERS = "latin+armenian"  # more than a hundred classes once look-alikes are dropped
EARLIER = "cyrillic+georgian"  # what the small transformer has learned before them


@checks.arguments
def even_odd(seed: int = 0, name: str = "digits", head: Head = "masked", *, limit: int | None = None) -> Stream:
    """The even digits, then the odd ones, of "digits" or "mnist"; the seed orders either five and draws the images.

    `head` "masked": ten outputs, a task's own given (task-incremental); "plain": ten outputs, all compete; "shared":
    five outputs for both, the label is the digit's place in its task (domain-incremental: the strongest conflict).
    """
    draw = np.random.default_rng(seed)
    order = [*(2 * draw.permutation(5)).tolist(), *(2 * draw.permutation(5) + 1).tolist()]
    scenario = "task" if head == "masked" else "class"
    stream = data.split(drawn(name, seed, limit), 2, order=order, scenario=scenario)
    return data.shared_head(stream) if head == "shared" else stream


def plane(
    methods: Mapping[str, Method], name: str = "digits", head: Head = "masked", profile: str = "fast"
) -> Comparison:
    """Methods on even then odd digits, to be compared on the plane of old and new accuracy."""
    limit = None if name == "digits" or profile == "paper" else 300
    words = f"{name}, even then odd in an order of the seed, {head} head" + (
        f", {limit} images a class" if limit else ""
    )
    labels = "task" if head == "masked" else "all"
    training = Training(epochs=16 if name == "digits" else 6, batch=32, lr=0.1, labels=labels)
    streams = {words: partial(even_odd, name=name, head=head, limit=limit)}
    return Comparison(streams, PERCEPTRON, methods, training, range(5), ends)


def parts() -> Comparison:
    """What the paper leaves open: optimizer state, schedule, first task, final merge, head; by p and by setting."""
    usual = plane({}).training
    changed: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "as in the paper": ({}, {}),
        "cosine schedule": ({}, {"schedule": "cosine"}),
        "no final merge": ({"final": False}, {}),
        "head as trained": ({"own": ("linear.",)}, {}),
        "untouched as trained": ({"untouched": "keep"}, {}),
    }
    for name, own in {"Adam": {"optimizer": "adamw", "lr": 0.002}, "momentum": {"momentum": 0.9, "lr": 0.02}}.items():
        changed |= {f"{name}, state kept": ({}, own), f"{name}, state reset": ({"optimizer": "reset"}, own)}
    methods = {}
    for p, (setting, (rule, own)) in product((0.25, 0.96), changed.items()):
        if setting != "no final merge" or p == 0.96:  # elsewhere the last merge comes anyway
            training = replace(usual, **own) if own else None
            made = Method(Learner(), SFA(p, 0.5, **rule), training, labels={"setting": setting})
            methods[f"p={p:g}" + (f", {setting}" if rule or own else "")] = made
    return replace(plane(methods), seeds=range(3))


def rotated(seed: int, angle: float) -> Stream:
    """The digits upright, then turned by an angle in degrees: one head for both, for any seed."""
    return data.rotated(data.digits(), (0, angle))


def permuted(seed: int, tasks: int, pixels: float) -> Stream:
    """The digits, in each later task with another permutation of a share of their `pixels`, which the seed draws."""
    return data.permuted(data.digits(), tasks, share=pixels, seed=seed)


def conflicting(seed: int, conflict: float, marked: bool = False) -> Stream:
    """Two tasks on the same images and the same head: even or odd, then at least five or not.

    The share `conflict` of the second task's labels is the opposite of the first's, from independent labels to exact
    contradiction. "marked" images carry a bright edge in the second task, so that a network that can tell the two
    exists.
    """
    return data.conflicting(data.digits(), conflict=conflict, marked=marked, seed=seed)


def twenty(seed: int, name: str = "letters") -> Stream:
    """Twenty tasks of five classes in an order that the seed draws, the task given: "letters", or images by name."""
    if name != "letters":
        return data.split(dataset(name), 20, order=seed, scenario="task")
    letters = data.glyphs(LETTERS, per_class=40, size=16)
    order = np.random.default_rng(seed).permutation(len(letters.classes))[:100].tolist()
    return data.split(letters, 20, order=order, scenario="task")


def small_mlp(stream: Stream, *, seed: int = 0) -> nn.Module:
    """The perceptron of the small theory test: 128 and 64 hidden units."""
    return models.mlp(stream, hidden=(128, 64), seed=seed)


PERCEPTRON = {"mlp 128-64": small_mlp}


def pretrained(stream: Stream, *, seed: int = 0) -> nn.Module:
    """A small transformer that has learned other scripts, with a fresh head for `stream`."""
    net = _vit(stream, seed=seed)
    body = {n: t for n, t in _body().items() if not n.startswith("linear.")}
    weights.set_weights(net, weights.get_weights(net) | body)
    return net


_vit = partial(models.vit, patch=4, dim=48, depth=2)


@functools.cache
def _body() -> weights.Weights:
    earlier = data.glyphs(EARLIER, per_class=40, size=16)
    adam = Training(8, 32, 0.002, optimizer="adamw", schedule="cosine", augment=False)
    return run(data.split(earlier, 1), _vit, training=adam, device="cpu", progress=False).weights[0]


def long_streams(methods: Mapping[str, Method], profile: str = "fast") -> Comparison:
    """Methods on `twenty` tasks: letters, a small transformer that has learned other scripts before.

    "paper" is CIFAR-100 at its full size with a larger one that has not learned anything; `real` lies between.
    """
    adam = Training(6, 32, 0.001, optimizer="adamw", labels="task", augment=False)
    if profile == "paper":
        adam, whole = replace(adam, epochs=20, augment=True), {"cifar100, 20 tasks": partial(twenty, name="cifar100")}
        larger = {"vit 192 x 6": partial(models.vit, patch=4, dim=192, depth=6, heads=6)}
        return Comparison(whole, larger, methods, adam, range(5), course)
    return Comparison(
        {"letters, 20 tasks": twenty}, {"vit 48 x 2, pretrained": pretrained}, methods, adam, range(3), course
    )


def similarity() -> Comparison:
    """How often to merge, by how alike two tasks are: upright digits, then turned ones, or some pixels permuted."""
    streams = {f"rotated by {angle}": partial(rotated, angle=angle) for angle in (0, 30, 60, 90, 180)}
    shares = {f"{share:.0%} of pixels permuted": share for share in (0.25, 0.5, 1.0)}
    streams |= {name: partial(permuted, tasks=2, pixels=share) for name, share in shares.items()}
    methods = grid(Learner) | grid(SFA, "SFA p={p:g} β={beta:g}", p=[i / 10 for i in range(1, 11)], beta=0.5)
    return Comparison(streams, PERCEPTRON, methods, Training(8, 32, 0.1), range(3), ends)


def hundred() -> Comparison:
    """A hundred tasks, in each another permutation of half of the pixels: does SFA still learn, and what does it keep?

    "1-1/k" is the β that gives each of k tasks an equal part.
    """
    methods = grid(Learner) | grid(SFA, "SFA p={p:g} β={beta:g}", p=0.25, beta=(0.5, 0.2))
    methods |= grid(SFA, "SFA p=1 β={beta}", p=1.0, beta={"0.5": 0.5, "1-1/k": "equal"})
    methods |= grid(OnlineEWC, strength=0.5, gamma=0.9)
    methods |= grid(DataBuffer, "buffer {share:.0%}, concatenate", share=0.05)
    streams = {"100 tasks": partial(permuted, tasks=100, pixels=0.5)}
    return Comparison(streams, PERCEPTRON, methods, Training(3, 32, 0.1), range(2), course)


def checkpoints() -> Comparison:
    """Anchors of one checkpoint or of several, over ten permutations of half of the pixels, beside buffers."""
    ps, anchors = (0.25, 1.0), ("previous", "uniform", "recency")
    methods = grid(Learner) | grid(Joint)
    methods |= grid(SFA, "SFA p={p:g} β={beta:g}, {anchor}", p=ps, beta=(0.2, 0.5), anchor=anchors)
    methods |= grid(SFA, "SFA p={p:g} β=1-1/k, {anchor}", p=ps, beta="equal", anchor=anchors[:2])
    methods |= grid(SFA, "SFA p={p:g}, 0.3 + 0.2 + 0.1 of the last three", p=ps, beta=0.6, anchor=[(0.3, 0.2, 0.1)])
    methods |= grid(DataBuffer, "buffer {share:.0%}, {mixing}", share=(0.05, 0.1), mixing=("concatenate", "half"))
    streams = {"10 tasks": partial(permuted, tasks=10, pixels=0.5)}
    return Comparison(streams, PERCEPTRON, methods, Training(8, 32, 0.1), range(3), course)


def conflicts() -> Comparison:
    """Methods by the share of classes on which two tasks contradict each other, with and without a mark of the task."""
    degrees = [(c, marked) for marked in (False, True) for c in (0.0, 0.25, 0.5, 0.75, 1.0)]
    streams = {
        f"c={c:g}{', marked' if marked else ''}": partial(conflicting, conflict=c, marked=marked)
        for c, marked in degrees
    }
    methods = grid(Learner) | grid(L2, "L2 λ={strength:g}", strength=0.1)
    methods |= grid(EWC, "EWC λ={strength:g}", strength=30.0)
    methods |= grid(SFA, "SFA p={p:g} β={beta:g}", p=(0.25, 1.0), beta=(0.2, 0.5))
    methods |= grid(DataBuffer, "buffer {share:.0%}, {mixing}", share=0.1, mixing="half")
    return Comparison(streams, PERCEPTRON, methods, Training(16, 32, 0.1), range(3), ends)


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


def retained(table: "pd.DataFrame", new: float, *, by: str = "line") -> "pd.DataFrame":
    """Accuracy on the old task where that on the new one is `new`: a row a seed, a column a line.

    Interpolated along each line's knob, so that lines are compared at equal plasticity and no single setting decides;
    a line that does not reach so far counts with its nearer end.
    """

    def level(one: "pd.DataFrame") -> float:
        one = one.sort_values("new")
        return float(np.interp(new, one.new, one.old))

    groups: Any = table.groupby(["seed", by], sort=False)[["new", "old"]]
    return groups.apply(level).unstack(by)


def elsewhere(table: "pd.DataFrame", value: str = "acc", *, by: str = "line") -> "pd.DataFrame":
    """`value` of each line at its best method on the other seeds, so that none chooses for itself: rows are seeds."""
    import pandas as pd

    def chosen(one: "pd.DataFrame") -> "pd.Series":
        wide = one.pivot_table(index="seed", columns="method", values=value)
        best: Any = (wide.sum() - wide).idxmax(axis=1)
        return pd.Series({seed: wide.loc[seed, method] for seed, method in best.items()})

    return pd.DataFrame({line: chosen(one) for line, one in table.groupby(by, sort=False)})


def sided(table: "pd.DataFrame") -> "pd.DataFrame":
    """Rows with the side that they stand on in the abstract: SFA with p below 1, its rivals, a buffer, or neither.

    Rivals are task arithmetic, TIES, WiSE-FT (which is p = 1), L2 and EWC.
    """
    sides = {"SFA": "SFA, p < 1", "data buffer": "buffer"}
    sides |= dict.fromkeys(("merging", "WiSE-FT", "L2", "EWC", "online EWC"), "rivals")
    kind = table.consolidation.where(table.consolidation != "none", table.learner)
    return table.assign(side=kind.map(sides).where(table.p != 1, "rivals").fillna("neither"))


@dataclass(frozen=True)
class _Kept(SFA):
    """SFA that keeps the weights before and after every merge, for `merges`."""

    def __call__(self, context: Context) -> Merged:
        merged = super().__call__(context)
        self.seen.append((context.previous, context.current, merged.train))  # type: ignore[attr-defined]
        return merged


def merges(seed: int, head: Head = "masked", p: float = 0.25, beta: float = 0.5) -> list[dict[str, float]]:
    """Every merge of even then odd digits: both tasks before and after, and the barrier between anchor and network.

    A row has the number (of the merge, from 1), old_before, old_after, new_before, new_after (test accuracies), and
    barrier: how far the mean test loss over both tasks rises, along the line from the anchor to the trained weights,
    above its chord.
    """
    stream, rule, rows = even_odd(seed, "digits", head), _Kept(p, beta), []
    object.__setattr__(rule, "seen", [])
    result = run(stream, small_mlp, None, rule, plane({}, head=head).training, seed=seed, progress=False)
    for number, (anchor, trained, merged) in enumerate(rule.seen, 1):  # type: ignore[attr-defined]
        line = landscape.curve(result.model, (anchor, trained), stream, 11)
        after = landscape.curve(result.model, (merged, merged), stream, [0.0]).accuracy[0]
        before = line.accuracy[-1]
        row = {"old_before": before[0], "old_after": after[0], "new_before": before[1], "new_after": after[1]}
        rows.append({"number": number} | row | {"barrier": line.barrier})
    return rows


def contradiction(seed: int, conflict: float) -> dict[str, float]:
    """The cosine between the gradients of the two tasks of `conflicting`, over all data; -1 is exact contradiction.

    "start": before any training; "learned": where the first task has ended.
    """
    stream = conflicting(seed, conflict)
    first, training = replace(stream, tasks=stream.tasks[:1]), Training(16, 32, 0.1)
    nets = {"start": small_mlp(stream, seed=seed)}
    nets["learned"] = run(first, small_mlp, training=training, seed=seed, progress=False).model.eval()
    row = {}
    for place, net in nets.items():
        a, b = (_gradient(net, task) for task in stream)
        row[place] = weights.dot(a, b) / weights.norm(a) / weights.norm(b)
    return row


def _gradient(net: nn.Module, task: data.Task) -> weights.Weights:
    loss = nn.functional.cross_entropy(net(task.prepare(task.train.x)), task.train.y)
    names = [name for name, _ in net.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(net.parameters())), strict=True))

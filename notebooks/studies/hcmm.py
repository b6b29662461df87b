"""The experiments of holistic continual model merging, HCMM (arXiv 2509.23592), at a laptop's scale and the paper's.

```python
table = page.table(hcmm.main("glyphs"), "glyphs")       # the three stages and the baselines, over five seeds
hcmm.steps(table)                                       # what each stage adds, seed by seed
net = hcmm.model(stream, "glyphs", "tangent")           # a pretrained encoder under a head that knows every class
```
"""

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clkit import landscape, representation
from clkit.consolidation import HCMM, Consolidation, Context, Merged, Merging, Progress, correct, importance_merge
from clkit.data import Stream
from clkit.experiments import Comparison, Method, contrasts, grid
from clkit.learners import EWC, Joint, Learner, LwF
from clkit.training import Result, Training, run
from clkit.weights import Weights, get_weights, set_weights
from studies.hcmm_streams import Mode, glyphs, known, model

if TYPE_CHECKING:
    import pandas as pd

TRAINING = Training(
    epochs=5, batch=64, lr=1e-3, optimizer="adamw", schedule="cosine", warmup=0.1, clip=1.0, labels="task"
)
PAPER = replace(TRAINING, epochs=10, batch=128, lr=1e-5, weight_decay=0.1)
"""The paper's training, but for a warm-up of 500 steps, which is longer than most of its tasks."""

MODES: tuple[Mode, Mode] = ("ordinary", "tangent")
MERGES = {"linear": "none", "importance": "corrected"}
"""HCMM's merges by name: the importance of each."""
ORDERS = ("sequential", "independent")
FULL = "tangent + importance + correction"  # HCMM
BASELINES = ("TIES, sequential", "MagMax, sequential", "average, sequential", "EWC", "LwF")
SHORT = ("ordinary", "ordinary + linear", "ordinary + importance", "tangent", "tangent + importance", FULL,
         "MagMax, sequential", "average, sequential")  # fmt: skip
TUNING_SEEDS = (100, 101)
PUBLISHED = Path(__file__).with_name("published")
CHOSEN = tomllib.loads(PUBLISHED.joinpath("hcmm.toml").read_text())

STEPS: dict[str, dict[str, tuple[str, str]]] = {
    "merging": {f"merging, {m}": (f"{m} + linear", m) for m in MODES},
    "importance": {f"importance, {m}": (f"{m} + importance", f"{m} + linear") for m in MODES},
    "correction": {f"correction, {m}": (f"{m} + importance + correction", f"{m} + importance") for m in MODES},
    "tangent space": {
        "tangent space, no merge": ("tangent", "ordinary"),
        "tangent space, linear": ("tangent + linear", "ordinary + linear"),
        "tangent space, importance": ("tangent + importance", "ordinary + importance"),
    },
    "HCMM": {f"HCMM over {name}": (FULL, name) for name in BASELINES},
}
"""What is compared with what: by stage, and for HCMM itself, the pairs of methods by name."""

CORRECTIONS: dict[str, dict[str, Any]] = {
    "released": {"lr": 1e-7},
    "ten steps": {"lr": 1e-4},
    "ridge 1000": {"by": "ridge", "strength": 1000.0},
    "ridge 100": {"by": "ridge", "strength": 100.0},
    "ridge 10": {"by": "ridge", "strength": 10.0},
    "ridge 1": {"by": "ridge", "strength": 1.0},
    "ridge 1, both": {"by": "ridge", "strength": 1.0},
}
"""Settings of `correct`; "both" takes the features of both parents in equal shares as its target."""

KEPT: dict[str, Consolidation] = {
    "linear average": HCMM(importance="none", correction="none"),
    "HCMM": HCMM(),
    "HCMM, Fisher": HCMM(importance="fisher"),
    "MagMax": Merging("magmax", {"scale": 0.5}),
    "TIES": Merging("ties"),
}
"""Consolidations of which `kept` tells what they keep."""


def fine_tuned(
    mode: Mode = "ordinary",
    lr: float = 1e-3,
    *,
    setting: str = "glyphs",
    learner: Learner | None = None,
    consolidation: Consolidation | None = None,
    training: Training | None = None,
) -> Method:
    """Fine-tuning, "ordinary" or in the "tangent" space, of a setting's network at a learning rate."""
    made = partial(model, setting=setting, mode=mode)
    return Method(learner or Learner(), consolidation, replace(training or TRAINING, lr=lr), made)


def merged(
    mode: Mode = "ordinary",
    lr: float = 1e-3,
    *,
    setting: str = "glyphs",
    training: Training | None = None,
    correction: Literal["steps", "ridge", "none"] = "none",
    **rule: Any,
) -> Method:
    """Fine-tuning as in `fine_tuned`, and after every task a merge by HCMM; `rule` has more of its settings."""
    consolidation = HCMM(correction=correction, **rule)
    return fine_tuned(mode, lr, setting=setting, consolidation=consolidation, training=training)


def averaged(merge: str, order: str, lr: float, setting: str = "glyphs", **options: float) -> Method:
    """Ordinary fine-tuning, and after every task a merge of all tasks' weights, trained in one of `ORDERS`."""
    return fine_tuned(lr=lr, setting=setting, consolidation=Merging(merge, options, order))  # type: ignore[arg-type]


def regularised(rule: Callable[[float], Learner], strength: float, lr: float, setting: str = "glyphs") -> Method:
    """Ordinary fine-tuning with a regulariser of a strength."""
    return fine_tuned(lr=lr, setting=setting, learner=rule(strength))


def compare(methods: Mapping[str, Method], seeds: Sequence[int], setting: str = "glyphs", **options: Any) -> Comparison:
    """Methods on the stream of a setting, with `course`; `options` are the stream's."""
    source = partial(known(setting).stream, **options)
    return Comparison(
        {setting: source}, {"zero-shot": partial(model, setting=setting)}, methods, TRAINING, seeds, course
    )


def course(result: Result) -> dict[str, Any]:
    """What a run reads of all classes: accuracy before any task, `zero_shot`, and after each, the list `course`.

    Both are means over all tasks, those still to come among them.
    """
    return {"zero_shot": float(result.initial.mean()), "course": result.accuracy.mean(1).tolist()}


def stages(setting: str = "glyphs") -> dict[str, Method]:
    """Every combination of the three stages: fine-tuning "ordinary" or in the "tangent" space, alone or with a merge
    ("linear" or by "importance"), with or without a correction; tangent + importance + correction is HCMM.
    """
    made, best = {}, CHOSEN.get(setting, CHOSEN["glyphs"])
    for mode in MODES:
        made[mode] = fine_tuned(mode, setting=setting, **best[mode])
        for name, importance in MERGES.items():
            own = partial(merged, mode, setting=setting, importance=importance, **best[f"{mode} + {name}"])
            made[f"{mode} + {name}"] = own()
            made[f"{mode} + {name} + correction"] = own(correction="ridge", ridge=100.0)
    return made


def baselines(setting: str = "glyphs") -> dict[str, Method]:
    """What HCMM is compared with: regularised fine-tuning, and merges of the weights after every task."""
    best = CHOSEN.get(setting, CHOSEN["glyphs"])
    made = {n: regularised(rule, setting=setting, **best[n]) for n, rule in {"EWC": EWC, "LwF": LwF}.items()}
    for order in ORDERS:
        for merge in ("average", "MagMax", "TIES"):
            name = f"{merge}, {order}"
            made[name] = averaged(merge.lower(), order, setting=setting, **best[name])
    return made


def main(setting: str = "glyphs", seeds: Sequence[int] = range(5)) -> Comparison:
    """All combinations of the stages, and the baselines."""
    return compare(stages(setting) | baselines(setting), seeds, setting)


def joint(setting: str = "glyphs", seeds: Sequence[int] = range(5)) -> Comparison:
    """All data at once: the glyphs as one task; of the fonts, those seen so far."""
    training = replace(TRAINING, labels="all")
    made = {"joint": fine_tuned(lr=3e-3, setting=setting, learner=Joint(), training=training)}
    return compare(made, seeds, setting, **({} if setting == "fonts" else {"tasks": 1}))


def comparisons() -> dict[str, Comparison]:
    """The comparisons at a laptop's scale, by name.

    All methods on the glyphs and on the fonts, with joint training; and some of them, as chosen on the glyphs, on the
    hundred characters in 5 and 10 tasks and on streams of real images.
    """
    found = {n: main(n) for n in ("glyphs", "fonts")} | {f"joint-{n}": joint(n) for n in ("glyphs", "fonts")}
    for tasks in (5, 10):
        made = {n: m for n, m in (stages() | baselines()).items() if n in SHORT}
        found[f"lengths-{tasks}"] = compare(made, range(3), tasks=tasks)
    for name, setting in {"cifar100": "cifar100", "pacs": "pacs", "mnist-usps": "mnist, usps"}.items():
        made = {n: m for n, m in (stages(setting) | baselines(setting)).items() if n in (*SHORT, "EWC", "LwF")}
        found[name] = compare(made, range(2), setting)
    return found


def paper(seeds: Sequence[int] = range(3)) -> Comparison:
    """CLIP's ViT-B/16 on CIFAR-100 in ten tasks: the stages with the released settings, and two baselines."""
    own: dict[str, Any] = {"setting": "cifar100, CLIP", "training": PAPER, "lr": PAPER.lr}
    released = partial(merged, alpha=0.4, importance="raw", **own)
    made = grid(partial(fine_tuned, **own), "{mode}", mode=MODES) | grid(released, "{mode} + importance", mode=MODES)
    made |= {"tangent + linear": released("tangent", importance="none")}
    made |= {FULL: released("tangent", correction="steps", correction_lr=1e-7)}
    made |= {"MagMax, sequential": fine_tuned(consolidation=Merging("magmax", {"scale": 0.5}), **own)}
    made |= {"average, sequential": fine_tuned(consolidation=Merging(), **own)}
    return compare(made, seeds, "cifar100, CLIP")


def tuning(setting: str = "glyphs") -> Comparison:
    """Learning rate, alpha and strengths, on seeds that no other grid has: other images, classes, orders, networks."""
    own: dict[str, Any] = {"setting": setting, "lr": (1e-3, 3e-3) if setting == "fonts" else (3e-4, 1e-3)}
    each: dict[str, Any] = own | {"order": ORDERS}
    made = grid(fine_tuned, "{mode} lr={lr:g}", mode=MODES, **own)
    name = "{mode} + {importance} lr={lr:g} α={alpha:g}"
    made |= grid(merged, name, mode=MODES, importance=MERGES, alpha=(0.2, 0.35, 0.5), **own)
    made |= grid(regularised, "{rule} lr={lr:g} λ={strength:g}", rule={"EWC": EWC}, strength=(10.0, 1e2, 1e3), **own)
    made |= grid(regularised, "{rule} lr={lr:g} λ={strength:g}", rule={"LwF": LwF}, strength=(0.3, 1.0, 3.0), **own)
    made |= grid(averaged, "average, {order} lr={lr:g}", merge="average", **each)
    merges = {"MagMax": "magmax", "TIES": "ties"}
    made |= grid(averaged, "{merge}, {order} lr={lr:g} s={scale:g}", merge=merges, scale=(0.5, 1.0), **each)
    return compare(made, TUNING_SEEDS, setting)


def steps(table: "pd.DataFrame", value: str = "acc") -> "pd.DataFrame":
    """What each stage adds to a table of `main`, and HCMM to each baseline, paired by seed, with Student's interval.

    A row for each stage and step of `STEPS`: gain, lower, upper, n, verdict.
    """
    import pandas as pd

    found = {stage: contrasts(table, pairs, value) for stage, pairs in STEPS.items()}
    return pd.concat(found, names=["stage", "step"]).rename(columns={"mean": "gain"})


def curves(table: "pd.DataFrame") -> "pd.DataFrame":
    """The runs of a sweep over alpha or the learning rate, with the curve that each is a point of as its method.

    Names are read from the columns of settings: "tangent + importance, sum", for example.
    """

    def curve(row: Mapping[Any, Any]) -> str:
        merge = "linear" if row.get("importance") == "none" else "importance"
        whole = row["mode"] if row["consolidation"] == "none" else f"{row['mode']} + {merge}"
        return f"{whole}, sum" if row.get("accumulate") == "sum" else whole

    return table.assign(method=[curve(row) for row in table.to_dict(orient="records")])


def listed() -> "pd.DataFrame":
    """What is known of the paper's numbers: top-1 accuracy in percent, as a third party lists them.

    The paper's tables could not be had, and its repository has no results.
    """
    import pandas as pd

    return pd.read_csv(PUBLISHED / "hcmm.csv")


class Remembering:
    """A consolidation as it is, of which the memo after every task is kept, by the task's number."""

    def __init__(self, inner: Consolidation) -> None:
        self.inner = inner
        self.memos: dict[int, Any] = {}
        for need in ("holdout", "uses_history", "uses_moments"):
            setattr(self, need, getattr(inner, need, False))

    def due(self, progress: Progress) -> bool:
        """When the consolidation is."""
        return self.inner.due(progress)

    def __call__(self, context: Context) -> Merged:
        """What the consolidation does."""
        merged = self.inner(context)
        self.memos[context.progress.task] = merged.memo
        return merged


def two_tasks(mode: Mode, lr: float, *, epochs: int = 15, seed: int = 0) -> tuple[Stream, Result, list[Weights]]:
    """Two tasks of ten characters learned one after the other: the stream, the run, and both tasks' importances.

    The weights after each task are the run's; importances are Adam's second moments, corrected for their bias.
    """
    stream, keep = glyphs(seed, 2, 20), Remembering(HCMM(alpha=1.0, correction="none"))
    net, training = model(stream, "glyphs", mode, seed=seed), replace(TRAINING, lr=lr, epochs=epochs)
    result = run(stream, net, None, keep, training, seed=seed, device="cpu", progress=False)
    return stream, result, list(keep.memos.values())


def along(
    stream: Stream, result: Result, importances: Sequence[Weights], points: int = 21
) -> dict[str, landscape.Curve]:
    """Test loss and accuracy from the first task's weights (alpha = 0) to the second's, by a line and by importance."""
    (first, second), (before, after) = result.weights, importances
    ways = {
        "linear": landscape.segment(first, second),
        "importance": lambda alpha: importance_merge(first, second, before, after, alpha),
    }
    return {name: landscape.curve(result.model, way, stream, points) for name, way in ways.items()}


def paths(seed: int, lr: float, mode: Mode, epochs: int = 15) -> list[dict[str, Any]]:
    """The curves of `along` for one network: the paper's figures 1, 2 and 4.

    Columns: merge, barrier (of the whole curve: how far its loss rises above the chord, at most), gap (how far above it
    is on average; below 0 where it sags), alpha, loss and accuracy (means over both tasks).
    """
    rows = []
    for merge, curve in along(*two_tasks(mode, lr, epochs=epochs, seed=seed)).items():
        loss = curve.loss.mean(1)
        gap = float((loss - np.interp(curve.ts, [0, 1], loss[[0, -1]])).mean())
        facts = {"merge": merge, "barrier": curve.barrier, "gap": gap}
        values = zip(curve.ts, loss, curve.accuracy.mean(1), strict=True)
        rows += [facts | {"alpha": float(t), "loss": float(l), "accuracy": float(a)} for t, l, a in values]
    return rows


def corrected(
    mode: Mode = "tangent", lr: float = 1e-3, *, alpha: float = 0.5, tasks: int = 20, every: int = 1, seed: int = 0
) -> Iterator[tuple[int, Stream, nn.Module, dict[str, Weights]]]:
    """Merges of a run on the glyphs, as they are and with each of `CORRECTIONS`, none of which the run goes on with.

    One in `every` is taken. Yields the task just learned (from 1 on), the stream, a scratch model, and weights by name:
    "previous", "trained", "merged", and the corrections.
    """
    stream = glyphs(seed, tasks)
    net, rule = model(stream, "glyphs", mode, seed=seed), HCMM(alpha=alpha, correction="none")
    result = run(stream, net, None, rule, replace(TRAINING, lr=lr), seed=seed, device="cpu", progress=False)
    scratch = deepcopy(result.model)
    for t in range(1, len(stream), every):
        previous, trained, merged = result.weights[t - 1], result.trained[t], result.weights[t]
        found = {"previous": previous, "trained": trained, "merged": merged}
        for name, options in CORRECTIONS.items():
            parents = [(0.5, previous), (0.5, trained)] if "both" in name else [(1.0, previous)]
            found[name] = correct(scratch, merged, parents, result.inputs[t], **options)[0]
        yield t, stream, scratch, found


def mismatches(seed: int, mode: Mode, lr: float = 1e-3, every: int = 3) -> "pd.DataFrame":
    """How far features are from those before the task, trained, merged and corrected: the paper's figure 3.

    On test images of the task just learned ("this task") and of all before it ("earlier tasks"). Columns: weights, on,
    l1, l2, cosine, cka (linear, unbiased), and accuracy (all classes compete); means over a run's merges.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for t, stream, scratch, found in corrected(mode, lr, every=every, seed=seed):
        for on, shown in {"this task": [stream[t]], "earlier tasks": stream.tasks[:t]}.items():
            x = torch.cat([task.prepare(task.test.x) for task in shown])
            y = torch.cat([task.test.y for task in shown])
            set_weights(scratch, found["previous"])
            before = representation.features(scratch, x)
            for name, weights in found.items():
                set_weights(scratch, weights)
                features = representation.features(scratch, x)
                far = representation.mismatch(features, before).iloc[0][["l1", "l2", "cosine"]].to_dict()
                alike = representation.cka(features, before, unbiased=True)
                with torch.no_grad():
                    right = scratch.get_submodule("head")(features).argmax(1) == y
                share = float(right.double().mean())
                rows.append({"weights": name, "on": on, **far, "cka": alike, "accuracy": share})
    means: Any = pd.DataFrame(rows).groupby(["weights", "on"], sort=False, as_index=False).mean()
    return means


def kept(seed: int, method: Consolidation, counts: Sequence[int] = (2, 5, 10, 20)) -> list[dict[str, float]]:
    """Bytes that a consolidation needs from one task to the next, by the number of tasks learned, over a network's.

    The weights deployed last, all trained ones where it uses them, and its memo; those before the first task are not
    counted. Columns: tasks, networks.
    """
    stream, spy, rows = glyphs(seed, max(counts), max(counts)), Remembering(method), []
    net = model(stream, "glyphs", seed=seed)
    size = nbytes(get_weights(net))
    result = run(stream, net, None, spy, replace(TRAINING, epochs=1), device="cpu", progress=False)
    for t in counts:
        total = nbytes(result.weights[t - 1]) + nbytes(spy.memos.get(t - 1) or {})
        total += sum(map(nbytes, result.trained[:t])) if getattr(method, "uses_history", False) else 0
        rows.append({"tasks": t, "networks": total / size})
    return rows


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of tensors in bytes."""
    return sum(t.nbytes for t in tensors.values())

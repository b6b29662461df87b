"""The experiments of holistic continual model merging, HCMM (arXiv 2509.23592), at three scales.

```python
table = page.table(hcmm.main("glyphs"), "glyphs")       # the three stages and the baselines, over five seeds
rows = page.real(hcmm.real()["pacs"], "pacs")           # on real images, under ImageNet's network
hcmm.steps(table)                                       # what each stage adds, seed by seed
net = hcmm.model(stream, "glyphs", "tangent")           # a pretrained encoder under a head that knows every class
```
"""

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clkit import landscape, representation
from clkit.consolidation import (
    HCMM,
    Consolidation,
    Context,
    Merged,
    Merging,
    NoConsolidation,
    Progress,
    correct,
    importance_merge,
)
from clkit.data import Stream
from clkit.evaluation import evaluate
from clkit.experiments import Comparison, Method, Study, contrasts, grid, study
from clkit.learners import EWC, Joint, Learner, LwF
from clkit.merging import magmax
from clkit.store import hash_tensor
from clkit.training import Result, Training, run
from clkit.weights import Weights, get_weights, lerp, set_weights
from studies.hcmm_streams import Mode, glyphs, known, model

if TYPE_CHECKING:
    import pandas as pd

TRAINING = Training(
    epochs=5, batch=64, lr=1e-3, optimizer="adamw", schedule="cosine", warmup=0.1, clip=1.0, labels="task"
)
FEW = replace(TRAINING, batch=32)
PAPER = replace(TRAINING, epochs=10, batch=128, lr=1e-5, weight_decay=0.1, warmup=500)
"""The paper's training; its warm-up is longer than most of its tasks."""
IMAGES = ("pacs", "cifar100")  # where ImageNet's network is tried

MODES: tuple[Mode, Mode] = ("ordinary", "tangent")
MERGES = {"linear": "none", "importance": "corrected"}
"""HCMM's merges by name: the importance of each."""
ORDERS = ("sequential", "independent")
FULL = "tangent + importance + correction"  # HCMM
BASELINES = ("TIES, sequential", "MagMax, sequential", "average, sequential", "EWC", "LwF")
SHORT = ("ordinary", "ordinary + linear", "ordinary + importance", "tangent", "tangent + importance", FULL,
         "MagMax, sequential", "average, sequential")  # fmt: skip
LONG = (*SHORT, "tangent + linear")
KEPT = ("ordinary", "ordinary + linear", "LwF", "EWC", "ordinary + importance", "tangent", "tangent + linear", FULL,
        "MagMax, running", "MagMax, sequential", "TIES, sequential")  # fmt: skip
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


@dataclass(frozen=True)
class RunningMagMax:
    """MagMax of a sequence from the weights of largest change so far, which are carried along instead of all networks.

    What is deployed is `Merging("magmax", {"scale": scale})`, up to rounding.
    """

    scale: float = 0.5
    base = True  # the weights before the first task are needed

    def due(self, progress: Progress) -> bool:
        """At the end of every task."""
        return progress.end

    def __call__(self, context: Context) -> Merged:
        """Takes the current weights into the maximum, and trains on from them."""
        current, base = context.current, context.base
        if not context.progress.task:
            return Merged(current, current, memo=current)
        memo = magmax([context.memo, current], base=base)
        return Merged(current, lerp(base, memo, self.scale), memo=memo)


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
    usual = FEW if setting in IMAGES else TRAINING
    return Method(learner or Learner(), consolidation, replace(training or usual, lr=lr), made)


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


def chosen(setting: str) -> dict[str, dict[str, Any]]:
    """What `tuning` chose for every method; for CIFAR-100 that of PACS."""
    return CHOSEN["pacs" if setting == "cifar100" else setting]


def stages(setting: str = "glyphs") -> dict[str, Method]:
    """Every combination of the three stages: fine-tuning "ordinary" or in the "tangent" space, alone or with a merge
    ("linear" or by "importance"), with or without a correction; tangent + importance + correction is HCMM.
    """
    made, best = {}, chosen(setting)
    for mode in MODES:
        made[mode] = fine_tuned(mode, setting=setting, **best[mode])
        for name, importance in MERGES.items():
            own = partial(merged, mode, setting=setting, importance=importance, **best[f"{mode} + {name}"])
            made[f"{mode} + {name}"] = own()
            made[f"{mode} + {name} + correction"] = own(correction="ridge", ridge=100.0)
    return made


def baselines(setting: str = "glyphs") -> dict[str, Method]:
    """What HCMM is compared with: regularised fine-tuning, and merges of the weights after every task."""
    best = chosen(setting)
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
    hundred characters in 5 and 10 tasks.
    """
    found = {n: main(n) for n in ("glyphs", "fonts")} | {f"joint-{n}": joint(n) for n in ("glyphs", "fonts")}
    for tasks in (5, 10):
        made = {n: m for n, m in (stages() | baselines()).items() if n in SHORT}
        found[f"lengths-{tasks}"] = compare(made, range(3), tasks=tasks)
    return found


def real() -> dict[str, Comparison | Study]:
    """What is run on real images under ImageNet's network, by name, what chose its settings first.

    PACS as four domains with five seeds, some baselines with three, and `disentangled`; CIFAR-100 in ten and in twenty
    tasks, a few methods with three.
    """

    def some(setting: str, names: Sequence[str], seeds: int, **options: Any) -> Comparison:
        every = stages(setting) | baselines(setting)
        return compare({name: every[name] for name in names}, range(seeds), setting, **options)

    found: dict[str, Comparison | Study] = {"pacs-tuning": tuning("pacs"), "pacs": some("pacs", LONG, 5)}
    found["vectors"] = study(disentangled, range(5), setting="pacs", mode=MODES)
    few = ("ordinary + importance", FULL, "MagMax, sequential", "average, sequential")
    found |= {f"cifar100-{tasks}": some("cifar100", few, 3, tasks=tasks) for tasks in (10, 20)}
    return found | {"pacs-baselines": some("pacs", ("TIES, sequential", "EWC", "LwF"), 3)}


def paper(seeds: Sequence[int] = range(3)) -> Comparison:
    """CLIP's ViT-B/16 on CIFAR-100 in ten tasks: the stages with the released settings, and the paper's baselines.

    The correction is the pass that is released, over squared differences and over absolute ones.
    """
    own: dict[str, Any] = {"setting": "cifar100, CLIP", "training": PAPER, "lr": PAPER.lr}
    released = partial(merged, alpha=0.4, importance="raw", **own)
    made = grid(partial(fine_tuned, **own), "{mode}", mode=MODES) | grid(released, "{mode} + importance", mode=MODES)
    made |= {"tangent + linear": released("tangent", importance="none")}
    corrected = partial(released, "tangent", correction="pass", correction_lr=1e-7)
    made |= {FULL: corrected(), f"{FULL}, L1": corrected(loss="absolute")}
    merges = {
        "average": Merging(),
        "MagMax": Merging("magmax", {"scale": 0.5}),
        "TIES": Merging("ties", {"scale": 0.55}),
    }
    merges |= {"RandMix": Merging(randmix)}
    made |= {f"{n}, sequential": fine_tuned(consolidation=merge, **own) for n, merge in merges.items()}
    made |= {n: fine_tuned(learner=rule, **own) for n, rule in {"EWC": EWC(1e6), "LwF": LwF(0.3)}.items()}
    return compare(made, seeds, "cifar100, CLIP")


def randmix(ws: Sequence[Weights], *, seed: int = 0) -> dict[str, Tensor]:
    """Every number from one of the weights, drawn at random: a baseline of MagMax (arXiv 2407.06322)."""
    generator = torch.Generator().manual_seed(seed)
    mixed = {}
    for name, first in ws[0].items():
        which = torch.randint(len(ws), (1, *first.shape), generator=generator).to(first.device)
        mixed[name] = torch.stack([w[name] for w in ws]).gather(0, which)[0]
    return mixed


def tuning(setting: str = "glyphs") -> Comparison:
    """Learning rate, alpha and strengths, on seeds that no other grid has: other images, classes, orders, networks.

    On real images, where the network is one for all seeds, on one seed and on images that it does not train on.
    """
    images = setting in IMAGES
    alphas, scales = (0.3, 0.5) if images else (0.2, 0.35, 0.5), (0.5, 1.0)
    own: dict[str, Any] = {"setting": setting, "lr": (3e-4, 1e-3) if setting != "fonts" else (1e-3, 3e-3)}
    each: dict[str, Any] = own | {"order": ORDERS[:1] if images else ORDERS}
    strengths = {"EWC": (1.0, 1e2), "LwF": (0.3, 3.0)} if images else {"EWC": (10.0, 1e2, 1e3), "LwF": (0.3, 1.0, 3.0)}
    made = grid(fine_tuned, "{mode} lr={lr:g}", mode=MODES, **own)
    name = "{mode} + {importance} lr={lr:g} α={alpha:g}"
    made |= grid(merged, name, mode=MODES, importance=MERGES, alpha=alphas, **own)
    for n, rule in {"EWC": EWC, "LwF": LwF}.items():
        made |= grid(regularised, "{rule} lr={lr:g} λ={strength:g}", rule={n: rule}, strength=strengths[n], **own)
    made |= grid(averaged, "average, {order} lr={lr:g}", merge="average", **each)
    merges = {"MagMax": "magmax", "TIES": "ties"}
    made |= grid(averaged, "{merge}, {order} lr={lr:g} s={scale:g}", merge=merges, scale=scales, **each)
    options = {"validate": True} if images else {}
    return compare(made, TUNING_SEEDS[: 1 if images else 2], setting, **options)


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


def lower(table: "pd.DataFrame") -> "pd.Series":
    """How much lower the lowest loss on paths of `paths` is by importance than on the line, a mean for each seed."""
    lowest: Any = table.groupby(["seed", "lr", "mode", "merge"]).loss.min().unstack("merge")
    return (lowest["linear"] - lowest["importance"]).groupby("seed").mean()


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


def disentangled(
    seed: int, setting: str = "glyphs", mode: Mode = "ordinary", lr: float = 1e-3, alphas: Sequence[float] = (0.5, 1.0)
) -> list[dict[str, float]]:
    """How far the task vectors of four tasks, each learned from the pretrained weights, leave each other's task alone.

    Columns: alpha, error (the disentanglement error at alpha, a mean over pairs), own (accuracy of each task's own
    network on it, among its classes). Glyphs come five characters a task.
    """
    stream = glyphs(seed, 4, 20) if setting == "glyphs" else known(setting).stream(seed)
    method = fine_tuned(mode, lr, setting=setting, consolidation=Merging(training="independent"))
    net, parts = model(stream, setting, mode, seed=seed), (method.learner, method.consolidation, method.training)
    result = run(stream, net, *parts, seed=seed, device="cpu", progress=False)
    own, rows = [], []
    for t, weights in enumerate(result.trained):
        set_weights(result.model, weights)
        own.append(evaluate(result.model, stream).masked[t])
    for alpha in alphas:
        found = landscape.disentanglement(result.model, get_weights(net), result.trained, stream, alpha)
        rows.append({"alpha": alpha, "error": 2 * float(np.nanmean(found)), "own": float(np.mean(own))})
    return rows


def kept(seed: int, method: str, counts: Sequence[int] = (2, 5, 10)) -> list[dict[str, float]]:
    """What a method of `KEPT` needs from one task to the next, by the number of tasks, in networks.

    Counted once are the weights that it trains on from and what it reads again: the memo, the learner's state, all
    networks before if they are used, and the first if task vectors or a linearised network start from it. What it
    deploys can be computed from these.
    """
    rows, running = [], {"MagMax, running": fine_tuned(consolidation=RunningMagMax())}
    made = (stages() | baselines() | running)[method]
    mode: Mode = "tangent" if method.startswith("tangent") else "ordinary"
    for t in counts:
        stream = glyphs(seed, t, 2 * max(counts))
        net, spy = model(stream, "glyphs", mode, seed=seed), Remembering(made.consolidation or NoConsolidation())
        training = replace(TRAINING, epochs=1)
        result = run(stream, net, made.learner, spy, training, seed=seed, device="cpu", progress=False)
        needs = getattr(getattr(spy.inner, "row", spy.inner), "base", False) or mode == "tangent"
        held = [get_weights(result.model), spy.memos.get(t - 1), vars(result.learner)]
        held += [get_weights(net)] * needs + result.trained * getattr(spy.inner, "uses_history", False)
        rows.append({"tasks": t, "networks": nbytes(held) / nbytes(get_weights(net))})
    return rows


def nbytes(tree: Any) -> int:
    """The size of all floating tensors in mappings, lists and tuples, in bytes; equal ones count once."""

    def found(part: Any) -> dict[str, int]:
        if isinstance(part, Tensor):
            return {hash_tensor(part): part.nbytes} if part.is_floating_point() else {}
        parts = part.values() if isinstance(part, Mapping) else part if isinstance(part, list | tuple) else ()
        return {key: size for each in parts for key, size in found(each).items()}

    return sum(found(tree).values())

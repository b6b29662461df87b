"""The experiments of CLeWI (Kozal et al. 2024, arXiv 2404.04002), at a laptop's scale and at the paper's.

```python
whole = clewi.main("fast")                  # a Comparison: what is compared, on what, over which seeds
table = page.table(whole, "main")
clewi.gains(table)                          # what CLeWI adds to each learner, beside what was published
```
"""

import copy
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clkit import alignment, curvature, data, evaluation, landscape, learners, models, normalization, weights
from clkit.consolidation import CLeWI, Context
from clkit.experiments import Comparison, Method, contrasts
from clkit.learners import AGEM, ER, DERpp, Learner, MemoryOnly, Sum
from clkit.training import ModelFactory, Result, Training, run
from clkit.weights import Weights
from studies.named import stream

if TYPE_CHECKING:
    import pandas as pd

DATASETS = ("cifar10", "cifar100", "tiny-imagenet")
PAIRS = ("ER", "A-GEM", "ER-ACE", "MIR", "BiC", "DER++")
GENTLE = 0.03  # the learning rate, at a laptop's scale, of rules with a penalty or a projection; of others it is 0.1
CHOSEN = tomllib.loads(Path(__file__).with_name("published").joinpath("clewi.toml").read_text())
JUNCTURE = "stage1.0.shortcut.weight"
BEST = "aligned, re-estimated"
Effect = Callable[["pd.DataFrame"], Any]
STRENGTHS = (0, 1, 10, 30)  # of EWC beside ER


def wide(times: int = 1, profile: str = "fast") -> ModelFactory:
    """The network of the smaller studies, `times` as wide: a convnet, or in the paper's profile a ResNet-18."""
    if profile == "paper":
        return partial(models.resnet18, width=64 * times)
    return partial(models.convnet, widths=(16 * times, 32 * times, 32 * times))


NET = {"convnet 16-32-32": wide()}


def chosen(part: str, name: str, dataset: str = "cifar10") -> Any:
    """What the paper chose for a method on one of DATASETS: its alpha, lr or weight_decay, or its settings by name."""
    place = DATASETS.index(dataset)
    found = CHOSEN[part].get(name, {})
    return {n: values[place] for n, values in found.items()} if part == "settings" else (found or [0.0] * 3)[place]


def rules(memory: int, *, dataset: str = "cifar10", fit_epochs: int | None = None) -> dict[str, Learner]:
    """The paper's learners by name; those that keep no memory get one to merge by.

    Strengths and weights are the paper's for one of DATASETS; `fit_epochs` of GDumb go before.
    """
    beside, own = MemoryOnly(memory), {name: chosen("settings", name, dataset) for name in CHOSEN["settings"]}
    return {
        "joint": learners.Joint(),
        "fine-tuning": beside,
        "online EWC": Sum(beside, learners.OnlineEWC(**own["online EWC"], labels="weighted")),
        "SI": Sum(beside, learners.SI(**own["SI"])),
        "iCaRL": learners.ICaRL(memory),
        "GDumb": learners.GDumb(memory, fit_epochs=fit_epochs or own["GDumb"]["fit_epochs"]),
        "ER": ER(memory),
        "A-GEM": AGEM(memory),
        "ER-ACE": learners.ERACE(memory),
        "MIR": learners.MIR(memory, candidates=64),
        "BiC": learners.BiC(memory),
        "DER++": DERpp(memory, **own["DER++"]),
    }


def main(profile: str = "fast", dataset: str | None = None) -> Comparison:
    """The main table: every learner by itself and with CLeWI.

    "fast": digits, a memory of 50, and the paper's pairs at alpha 0.3; where the paper has another one for CIFAR-10,
    at that, too. "paper": the paper's pairs, alphas, learning rates, 50 epochs and seeds, ResNet-18, memory 500, on one
    of DATASETS.
    """
    if profile == "paper":
        name = dataset or "cifar10"
        made = rules(500, dataset=name)
        del made["joint"]  # which is `joint`, one run
        made["BiC"] = learners.BiC(500, **chosen("settings", "BiC", name))
        multistep = {"schedule": "multistep", "milestones": (0.7, 0.9)} if name == "cifar100" else {}
        training = Training(epochs=50, batch=32, lr=0.1, **multistep)
        pairs = {f"{n} + CLeWI": (made[n], CLeWI(chosen("alpha", n, name))) for n in PAIRS}
        pairs["DER++ + CLeWI"] = DERpp(500, **chosen("settings", "DER++ + CLeWI", name)), pairs["DER++ + CLeWI"][1]
        both = {n: (rule, None) for n, rule in made.items()} | pairs
        methods = {
            n: Method(*pair, replace(training, lr=chosen("lr", n, name), weight_decay=chosen("weight_decay", n, name)))
            for n, pair in both.items()
        }
        return Comparison(stream(name), {"resnet18": models.resnet18}, methods, training, range(43, 48), plasticity)
    made = rules(50, fit_epochs=63)
    del made["joint"]
    methods = {n: Method(rule, None, _gentle(rule)) for n, rule in made.items()}
    for n in PAIRS:
        for alpha, kind in {chosen("alpha", n): "paper's α", 0.3: "CLeWI"}.items():
            methods[f"{n} + {kind}"] = replace(methods[n], consolidation=CLeWI(alpha))
    return small("fast", methods)


def real(part: str = "pair") -> Comparison:
    """CIFAR-10 in five tasks, ResNet-18 of width 16 with augmentation, memory 500, at the paper's alphas and rates.

    The seed orders the classes, draws the images and starts the network; eight epochs of 1,000 images a class. `part`:
    "pair", ER with and without CLeWI, five seeds; "alphas", ER beside CLeWI at alpha 0.1 to 0.5, two; "learners",
    ER-ACE and DER++ with and without CLeWI, three, on half the images.
    """
    full = main("paper", "cifar10")
    images, seeds = {"pair": (1000, 5), "alphas": (1000, 2), "learners": (500, 3)}[part]
    names = ("ER-ACE", "ER-ACE + CLeWI", "DER++", "DER++ + CLeWI") if part == "learners" else ("ER", "ER + CLeWI")
    methods = {name: full.methods[name] for name in names}
    if part == "alphas":
        both = methods.pop("ER + CLeWI")
        methods |= {f"CLeWI {a}": replace(both, consolidation=CLeWI(a)) for a in (0.1, 0.2, 0.3, 0.4, 0.5)}
    short = {"epochs": 8, "precision": "bfloat16"}
    methods = {n: replace(m, training=replace(m.training or full.training, **short)) for n, m in methods.items()}
    nets = {"resnet18, width 16": partial(models.resnet18, width=16)}
    training, streams = replace(full.training, **short), stream("cifar10", limit=images)
    return Comparison(streams, nets, methods, training, range(seeds), plasticity)


def joint(profile: str = "fast", dataset: str = "cifar10") -> Comparison:
    """The main table's joint training: one run from scratch over all classes as one task, so that none is forgotten.

    At a laptop's scale the learning rate falls to 0, so that the last few images of an epoch do not upset the end.
    """
    whole, name, changes = small("fast", {}), "digits", {"schedule": "cosine"}
    if profile == "paper":
        whole, name = main("paper", dataset), dataset
        changes = {"lr": chosen("lr", "joint", dataset), "schedule": "constant"}
    training, methods = replace(whole.training, **changes), {"joint": Method(Learner())}
    return replace(whole, streams=stream(name, 1), methods=methods, training=training, measure=None)


def constrained(strengths: Sequence[float] = STRENGTHS) -> Comparison:
    """ER beside elastic weight consolidation of these strengths, each alone and with CLeWI at alpha 0.3, on digits.

    Steps are clipped to a norm of 1: a strong pull of Fisher information that is large would diverge.
    """
    methods = {}
    for strength in strengths:
        rule = Sum(ER(50), learners.EWC(strength)) if strength else ER(50)
        methods |= {f"EWC {strength}": Method(rule), f"EWC {strength} + CLeWI": Method(rule, CLeWI(0.3))}
    whole = small("fast", methods)
    return replace(whole, training=replace(whole.training, clip=1.0))


def small(profile: str, methods: Mapping[str, Method], **changes: Any) -> Comparison:
    """The setting of the smaller studies: digits and a convnet, or CIFAR-100 in ten tasks with ResNet-18."""
    if profile == "paper":
        whole = main("paper", "cifar100")
        whole = replace(whole, training=replace(whole.training, lr=0.1))
    else:
        whole = Comparison(stream("digits"), NET, {}, Training(5, 32, 0.1), range(5), plasticity)
    return replace(whole, methods=methods, **changes)


def lengths(profile: str) -> Comparison:
    """The same classes in 5, 10 and 20 tasks: CIFAR-100, or 20 rendered letters."""
    if profile == "paper":
        name, whole = "cifar100", main("paper", "cifar100")
        methods = {n: m for n, m in whole.methods.items() if n == "ER + CLeWI" or "CLeWI" not in n}
    else:
        name, whole, made = "letters", small("fast", {}, seeds=range(3)), rules(100)
        methods = {n: Method(made[n]) for n in ("ER", "iCaRL")}
        methods["ER + CLeWI"] = Method(made["ER"], CLeWI(0.3))
    streams = {words: source for tasks in (5, 10, 20) for words, source in stream(name, tasks).items()}
    return replace(whole, streams=streams, methods=methods)


def equal_bytes(memory: int = 50) -> Comparison:
    """CLeWI on digits against ER whose memory may also have the bytes of the second network that CLeWI keeps."""
    tasks = stream("digits")["digits, 5 tasks"](0)
    network = sum(t.nbytes for t in weights.get_weights(wide()(tasks, seed=0)).values())
    methods = {f"ER {m}": Method(ER(m)) for m in (memory, memory + network // (tasks[0].train.x[0].nbytes + 1))}
    methods[f"ER {memory} + CLeWI"] = Method(ER(memory), CLeWI(0.3))
    return small("fast", methods)


def plasticity(result: Result) -> dict[str, float]:
    """How plastic a run was and what its merges did.

    `weight_change`: the relative distance of a task's trained weights from those it began with; `fisher_trace` there,
    the exact Fisher information on what the learner lets a consolidation see, up to 100 inputs; both are means over the
    tasks after the first, and of parameters alone. `masked`: task-incremental accuracy in the end. `alpha`: the mean
    over the merges, not a number without any.
    """
    net = copy.deepcopy(result.model)
    names = set(dict(net.named_parameters()))
    changes, traces = [], []
    device = next(net.parameters()).device
    for t in range(1, len(result.trained)):
        start, end = ({n: w[n] for n in names} for w in (result.weights[t - 1], result.trained[t]))
        changes.append(weights.norm(weights.sub(end, start)) / weights.norm(start))
        weights.set_weights(net, {n: w.to(device) for n, w in result.trained[t].items()})
        found = curvature.fisher(net, result.inputs[t][:100].to(device), labels="exact")
        traces.append(curvature.diagonal_trace(found))
    alphas = [report["alpha"] for report in result.reports if report]
    return {
        "weight_change": float(torch.tensor(changes).mean()),
        "fisher_trace": float(torch.tensor(traces).mean()),
        "masked": float(result.masked[-1].mean()),
        "alpha": sum(alphas) / len(alphas) if alphas else float("nan"),
    }


def released() -> "pd.DataFrame":
    """What CLeWI's released runs gave, of which the paper's tables are made: shares of 1, by dataset and method.

    Average accuracy `acc` and forgetting measure `fm` (divided by the number of tasks) with their standard deviations
    over 5 seeds (ddof 0).
    """
    import pandas as pd

    table = pd.read_csv(Path(__file__).with_name("published") / "clewi.csv").set_index(["dataset", "method"])
    return table / 100


@dataclass(frozen=True)
class DroppedJunctures(CLeWI):
    """CLeWI with the matching of its released code, which changes the old network's function on the way.

    The stem's channels and the first stage's, two ends of one residual stream, are matched apart. A juncture, a 1x1
    convolution in the place of the first block's identity shortcut, would connect them. After the permutation P2 P0^T
    of the two stands in it; the code overwrites it with the identity. The report has `dropped`: the largest change of
    the old network's logits on the memory, as a share of their range; and `kept`, the change with the juncture in.

    Of `models.resnet18` alone; its later stages have convolutions where the shape changes, and need no juncture.
    """

    def check(self, model: torch.nn.Module, x: torch.Tensor) -> None:
        """Refuses other networks than `models.resnet18`."""
        joined(model)

    def aligned(self, context: Context) -> tuple[Weights, dict[str, Any]]:
        """The previous weights, permuted with a juncture that is dropped then, and a report on the matching."""
        net, x = joined(context.model), context.inputs
        juncture = {JUNCTURE: net.get_parameter(JUNCTURE).detach()}
        before, current = {**context.previous, **juncture}, {**context.current, **juncture}
        symmetry = alignment.symmetry(net, x[:2])
        given = {"model": net, "previous": before, "current": current, "inputs": x, "symmetry": lambda: symmetry}
        moved, report = super().aligned(Context(**given))
        logits, *others = (evaluation.outputs(net, w, x) for w in (before, moved, {**moved, **juncture}))
        changes = [float((z - logits).abs().max() / (logits.max() - logits.min())) for z in others]
        report |= dict(zip(("kept", "dropped"), changes, strict=True))
        return {name: moved[name] for name in context.previous}, report


def joined(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a `models.resnet18` with a juncture: a 1x1 convolution, the identity, for the first block's shortcut.

    Raises ValueError for another network.
    """
    block: Any = getattr(model, "stage1", [None])[0]
    if not isinstance(block, models.BasicBlock) or len(list(block.shortcut.children())):
        raise ValueError(f"model: {type(model).__name__} has no stem before an identity shortcut; use models.resnet18")
    net: Any = copy.deepcopy(model)
    like = net.conv.weight
    conv = torch.nn.Conv2d(len(like), len(like), 1, bias=False, device=like.device, dtype=like.dtype)
    torch.nn.init.dirac_(conv.weight)
    net.stage1[0].shortcut = conv
    return net


class Cumulative(ER):
    """ER after whose merges BatchNorm's momentum stays None, as CLeWI's released code leaves it.

    Running statistics are then means over all batches since, at first those of the memory that they were re-estimated
    on (32 rows each in the code): later steps move them less and less, where the usual momentum of 0.1 forgets.
    """

    def on_consolidated(self, model: torch.nn.Module, task: data.Task) -> None:
        """Switches the momentum off in the network that training goes on with, unless nothing was merged yet."""
        super().on_consolidated(model, task)
        for name in normalization.batchnorms(model) if task.index else ():
            norm: Any = model.get_submodule(name)
            norm.momentum = None
            norm.num_batches_tracked.fill_(-(-len(self.store) // 32))


def published(seed: int) -> list[dict[str, Any]]:
    """CLeWI as it should be, and with what its released code does otherwise, one thing at a time, on digits.

    Columns: method; what is otherwise; acc, forgetting and last, as in a run's summary; changed, how far permuting
    moves the old network's logits, as a share of their range, at most over the merges. In a stream the stem keeps its
    channels, so "two beginnings" permutes one network towards another of the same task: acc is then its own.
    """
    [tasks], [whole] = ([made(seed) for made in stream("digits", n).values()] for n in (5, 1))
    convnet, small = wide(), partial(models.resnet18, width=8)
    er, usual, long, short = ER(50), CLeWI(0.3), Training(5, 32, 0.1), Training(2, 32, 0.1)
    runs = [
        ("ER + CLeWI", "", convnet, er, usual, long),
        ("ER + CLeWI", "momentum None", convnet, Cumulative(50), usual, long),
        ("ER + CLeWI, ResNet-18", "", small, er, usual, short),
        ("ER + CLeWI, ResNet-18", "dropped junctures", small, er, DroppedJunctures(0.3), short),
    ]
    rows = []
    for method, what, net, rule, merge, training in runs:
        result = run(tasks, net, rule, merge, training, seed=seed, progress=False)
        facts, moved = result.summary(), [report.get("dropped", 0.0) for report in result.reports if report]
        rows.append({"method": method, "what": what, **{n: facts[n] for n in ("acc", "forgetting", "last")}})
        rows[-1]["changed"] = max(moved, default=0.0)
    one, other = (run(whole, small, training=short, seed=s, progress=False) for s in (seed, seed + 1000))
    old, test = one.weights[0], whole[0].test
    given = Context(model=one.model.cpu(), previous=old, current=other.weights[0], inputs=one.inputs[0][:50])
    moved, report = DroppedJunctures().aligned(given)
    for what, w, change in (("", old, report["kept"]), ("dropped junctures", moved, report["dropped"])):
        acc = evaluation.score(given.model, data.Examples(whole[0].prepare(test.x), test.y), w).accuracy
        rows.append({"method": "two beginnings, ResNet-18", "what": what, "acc": acc, "forgetting": float("nan")})
        rows[-1] |= {"last": float("nan"), "changed": change}
    return rows


def gains(table: "pd.DataFrame", kind: str = "CLeWI") -> "pd.DataFrame":
    """What CLeWI adds to each learner of a main table, seed by seed, beside what was published.

    A row a learner that has a pair `<learner> + <kind>`: its average accuracy `alone`; the mean `gain` over the seeds
    with Student's interval and verdict, as `contrasts` gives them; `less`, by how much forgetting falls; `masked`, what
    task-incremental accuracy gains; and the published gains on each of DATASETS, NaN where there is none.
    """
    names = dict.fromkeys(table.method)
    pairs = {name: (f"{name} + {kind}", name) for name in names if f"{name} + {kind}" in names}
    found: Any = contrasts(table, pairs).rename(columns={"mean": "gain"}).drop(columns="n").rename_axis(None)
    found.insert(0, "alone", table.groupby("method").acc.mean()[list(pairs)].to_numpy())
    found["less"] = -contrasts(table, pairs, "forgetting")["mean"]
    found["masked"] = contrasts(table, pairs, "masked")["mean"]
    acc: Any = released().acc.unstack("dataset")
    for dataset in DATASETS:
        known = {name: acc[dataset][f"{name} + CLeWI"] - acc[dataset][name] for name in PAIRS}
        found[dataset] = [known.get(name, float("nan")) for name in pairs]
    return found


def added(*names: str, value: str = "acc") -> Effect:
    """An effect to claim: what CLeWI adds to `value` of these learners, their mean, by seed."""

    def effect(table: "pd.DataFrame") -> Any:
        found = _by_seed(table, value)
        return sum(found[f"{name} + CLeWI"] - found[name] for name in names) / len(names)

    return effect


def inside(inner: Sequence[str], ends: Sequence[str]) -> Effect:
    """An effect to claim: accuracy of the method of `inner` that is best on all other seeds, less the best of `ends`.

    The ends' best is that of the seed itself, which counts against the claim.
    """

    def effect(table: "pd.DataFrame") -> Any:
        found = _by_seed(table, "acc")
        best = (found.sum() - found)[list(inner)].idxmax(axis=1)
        return {seed: row[best[seed]] - row[list(ends)].max() for seed, row in found.iterrows()}

    return effect


def traded(low: str, high: str) -> Effect:
    """An effect to claim: from method `low` to `high` forgetting falls, and accuracy on the last task: the lesser."""

    def effect(table: "pd.DataFrame") -> Any:
        falls = [_by_seed(table, value)[low] - _by_seed(table, value)[high] for value in ("forgetting", "last")]
        return falls[0].clip(upper=falls[1])

    return effect


def _by_seed(table: "pd.DataFrame", value: str) -> Any:
    """A row a seed, a column a method."""
    return table.pivot_table(index="seed", columns="method", values=value)


def curves(
    seed: int, method: str, alpha: float | None = None, times: int = 1, profile: str = "fast"
) -> list[dict[str, Any]]:
    """Test accuracy along the line of every merge, old network aligned and statistics re-estimated at every point.

    Columns: after (tasks learned); at, the place on the line; accuracy, the mean over the tasks seen; new, on the
    newest of them. The run merges at `alpha`, by default its pair's own. Logits are the network's own, uncorrected.
    """
    whole = main(profile, "cifar100" if profile == "paper" else None)
    tasks, rule = next(iter(whole.streams.values()))(seed), whole.methods[method]
    merge = whole.methods[f"{method} + CLeWI"].consolidation if alpha is None else CLeWI(alpha)
    training = rule.training or whole.training
    result = run(tasks, wide(times, profile), rule.learner, merge, training, seed=seed, progress=False)
    found = landscape.merges(result.model, result.trained, result.weights, result.inputs, tasks, variants=(BEST,))
    return [
        {"after": after, "at": float(t), "accuracy": float(row.mean()), "new": float(row[-1])}
        for after, curve in enumerate((lines[BEST] for lines in found), 2)
        for t, row in zip(curve.ts, curve.accuracy, strict=True)
    ]


def _gentle(rule: Learner) -> Training | None:
    """The training of a rule with a penalty or a projection, or without rehearsal, at a laptop's scale; else None."""
    return Training(5, 32, GENTLE) if isinstance(rule, AGEM | Sum | MemoryOnly) else None

"""The experiments of CLeWI (Kozal et al. 2024, arXiv 2404.04002), at a laptop's scale and at the paper's.

```python
whole = clewi.main("fast")                  # a Comparison: what is compared, on what, over which seeds
table = page.table(whole, "main")
clewi.gains(table)                          # what CLeWI adds to each learner, beside what was published
```
"""

import copy
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clkit import alignment, curvature, data, evaluation, landscape, learners, models, normalization, weights
from clkit.consolidation import CLeWI, Context
from clkit.experiments import Comparison, Method, contrasts
from clkit.learners import AGEM, ER, DERpp, Learner, MemoryOnly, Sum
from clkit.training import Result, Training, run
from clkit.weights import Weights
from studies.named import stream

if TYPE_CHECKING:
    import pandas as pd

DATASETS = ("cifar10", "cifar100", "tiny-imagenet")
PAIRS = ("ER", "A-GEM", "ER-ACE", "MIR", "BiC", "DER++")
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}  # of ten classes each, in bytes
GENTLE = 0.03  # the learning rate, at a laptop's scale, of rules with a penalty or a projection; of others it is 0.1
CHOSEN = tomllib.loads(Path(__file__).with_name("published").joinpath("clewi.toml").read_text())
JUNCTURE = "stage1.0.shortcut.weight"
SMALL = {"convnet 16-32-32": partial(models.convnet, widths=(16, 32, 32))}


def chosen(part: str, name: str, dataset: str = "cifar10") -> Any:
    """What the paper chose for a method on one of DATASETS: its alpha, lr or weight_decay, or its settings by name."""
    place = DATASETS.index(dataset)
    found = CHOSEN[part].get(name, {})
    return {n: values[place] for n, values in found.items()} if part == "settings" else (found or [0.0] * 3)[place]


def rules(memory: int, *, dataset: str = "cifar10", beyond: bool = False, **other: Any) -> dict[str, Learner]:
    """The paper's learners by name, with `beyond` more rules; those that keep no memory get one to merge by.

    Strengths and weights are the paper's for one of DATASETS; `other` settings go before: `fit_epochs` of GDumb, and
    `ewc`, the strength of the EWCs.
    """
    beside, own = MemoryOnly(memory), {name: chosen("settings", name, dataset) for name in CHOSEN["settings"]}
    ewc = {"strength": other.get("ewc", own["online EWC"]["strength"])}
    fit = {"fit_epochs": other.get("fit_epochs", own["GDumb"]["fit_epochs"])}
    made = {
        "joint": learners.Joint(),
        "fine-tuning": beside,
        "online EWC": Sum(beside, learners.OnlineEWC(**ewc, labels="weighted")),
        "SI": Sum(beside, learners.SI(**own["SI"])),
        "iCaRL": learners.ICaRL(memory),
        "GDumb": learners.GDumb(memory, **fit),
        "ER": ER(memory),
        "A-GEM": AGEM(memory),
        "ER-ACE": learners.ERACE(memory),
        "MIR": learners.MIR(memory, candidates=64),
        "BiC": learners.BiC(memory),
        "DER++": DERpp(memory, **own["DER++"]),
    }
    others = {
        "L2": Sum(beside, learners.L2()),
        "EWC": Sum(beside, learners.EWC(**ewc)),
        "MAS": Sum(beside, learners.MAS()),
        "LwF": Sum(beside, learners.LwF()),
        "GEM": learners.GEM(memory),
        "DER": learners.DER(memory, alpha=0.2),
    }
    return made | others if beyond else made


def main(profile: str = "fast", dataset: str | None = None) -> Comparison:
    """The main table: every learner by itself and with CLeWI.

    "fast": digits, a memory of 50, all of `rules`, with alpha 0.3 and with alpha searched on held-out memory.
    "paper": the paper's pairs, alphas, learning rates, 50 epochs and seeds, ResNet-18, memory 500, on one of DATASETS.
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
    methods = {}
    for n, rule in rules(50, beyond=True, fit_epochs=63).items():
        own = _gentle(rule)
        methods |= {n: Method(rule, None, own), f"{n} + CLeWI": Method(rule, CLeWI(0.3), own)}
        if rule.remembers:
            methods[f"{n} + search"] = Method(rule, CLeWI("search"), own)
    return replace(small("fast", methods), streams=stream(dataset or "digits"), measure=plasticity)


def real(part: str = "pair") -> Comparison:
    """CIFAR-10 in five tasks, ResNet-18 of width 16 with augmentation, memory 500, at the paper's alphas and rates.

    The seed orders the classes, draws the images and starts the network. `part`: "pair", ER with and without CLeWI,
    2,000 images a class and ten epochs, five seeds. On half the images and eight epochs: "alphas", ER beside CLeWI at
    alpha 0.1 to 0.5, two seeds; "learners", ER-ACE and DER++ with and without CLeWI, three.
    """
    full = main("paper", "cifar10")
    images, epochs, seeds = {"pair": (2000, 10, 5), "alphas": (1000, 8, 2), "learners": (1000, 8, 3)}[part]
    names = ("ER-ACE", "ER-ACE + CLeWI", "DER++", "DER++ + CLeWI") if part == "learners" else ("ER", "ER + CLeWI")
    methods = {name: full.methods[name] for name in names}
    if part == "alphas":
        both = methods.pop("ER + CLeWI")
        methods |= {f"CLeWI {a}": replace(both, consolidation=CLeWI(a)) for a in (0.1, 0.2, 0.3, 0.4, 0.5)}
    short = {"epochs": epochs, "precision": "bfloat16"}
    methods = {n: replace(m, training=replace(m.training or full.training, **short)) for n, m in methods.items()}
    nets = {"resnet18, width 16": partial(models.resnet18, width=16)}
    training, streams = replace(full.training, **short), stream("cifar10", limit=images)
    return Comparison(streams, nets, methods, training, range(seeds), plasticity)


def joint(
    profile: str = "fast", dataset: str | None = None, *, whole: Comparison | None = None, limit: int | None = None
) -> Comparison:
    """The tables' joint training: one run from scratch over all classes as one task, so that none is forgotten.

    In the setting of `whole`, by default that of `main`. (`Joint` in the "fast" `main` goes on from task to task, with
    the data of all so far.)
    """
    name, lr = dataset or ("cifar10" if profile == "paper" else "digits"), None
    if whole is None:
        whole = main("paper", name) if profile == "paper" else small("fast", {})
        lr = chosen("lr", "joint", name) if profile == "paper" else None
    training = replace(whole.training, lr=lr or whole.training.lr, schedule="constant")
    streams = stream(name, 1, limit=limit)
    return replace(whole, streams=streams, methods={"joint": Method(Learner())}, training=training, measure=None)


def small(profile: str, methods: Mapping[str, Method], **changes: Any) -> Comparison:
    """The setting of the smaller studies: digits and the convnet, or CIFAR-100 in ten tasks with ResNet-18."""
    if profile == "paper":
        whole = main("paper", "cifar100")
        whole = replace(whole, training=replace(whole.training, lr=0.1), seeds=range(43, 46), measure=None)
    else:
        whole = Comparison(stream("digits"), {"convnet": models.convnet}, {}, Training(10, 32, 0.1), range(5))
    return replace(whole, methods=methods, **changes)


def reduced(
    dataset: str, *, limit: int, epochs: int, memory: int, ewc: float = 10.0, seeds: Sequence[int] = (0, 1, 2)
) -> Comparison:
    """The paper's main table on `limit` images a class and a small convnet: its pairs at its alphas, one learning rate.

    Alphas are those of CIFAR-100 for cifar100 and of CIFAR-10 for others. The learning rate is 0.1, of rules with a
    penalty or a projection 0.03, the same with and without CLeWI. `ewc` is the strength of online EWC, whose steps
    grow without bound where it is too large for the learning rate.
    """
    published, training = "cifar100" if dataset == "cifar100" else "cifar10", Training(epochs=epochs, batch=32, lr=0.1)
    methods = {}
    for n, rule in rules(memory, fit_epochs=63, ewc=ewc).items():
        methods[n] = Method(rule, None, _gentle(rule, training))
        if n in PAIRS:
            pair = CLeWI(chosen("alpha", n, published))
            methods[f"{n} + CLeWI"] = Method(rule, pair, _gentle(rule, training))
    return Comparison(stream(dataset, limit=limit), SMALL, methods, training, seeds)


def lengths(profile: str) -> Comparison:
    """The same classes in 5, 10 and 20 tasks: CIFAR-100, or 20 rendered letters."""
    if profile == "paper":
        name, whole = "cifar100", main("paper", "cifar100")
        methods = {n: m for n, m in whole.methods.items() if n == "ER + CLeWI" or "CLeWI" not in n}
    else:
        name, whole, made = "letters", small("fast", {}, seeds=range(3)), rules(100)
        methods = {n: Method(made[n]) for n in ("fine-tuning", "ER", "ER-ACE", "DER++", "iCaRL")}
        methods |= {"ER + CLeWI": Method(made["ER"], CLeWI(0.3)), "ER + search": Method(made["ER"], CLeWI("search"))}
    streams = {words: source for tasks in (5, 10, 20) for words, source in stream(name, tasks).items()}
    return replace(whole, streams=streams, methods=methods)


def wide(stream: data.Stream, *, times: int, profile: str = "fast", seed: int = 0) -> torch.nn.Module:
    """The network of the smaller studies, `times` as wide: a convnet, or in the paper's profile a ResNet-18."""
    if profile == "paper":
        return models.resnet18(stream, width=64 * times, seed=seed)
    return models.convnet(stream, widths=(8 * times, 16 * times, 16 * times), seed=seed)


def equal_bytes(dataset: str, memory: int, *, limit: int | None = None, seeds: Sequence[int] = (0, 1, 2)) -> Comparison:
    """CLeWI with a memory against ER whose memory may also have the bytes of the second network that CLeWI keeps."""
    blank = data.Examples(torch.zeros(10, *SHAPES[dataset], dtype=torch.uint8), torch.arange(10))
    [net] = [make(data.split(data.Dataset("blank", blank, blank, tuple("0123456789")), 1), seed=0)
             for make in SMALL.values()]  # fmt: skip
    total = memory + sum(t.nbytes for t in weights.get_weights(net).values()) // (blank.x[0].nbytes + 1)
    methods = {f"ER {m}": Method(ER(m)) for m in (memory, total)}
    methods[f"ER {memory} + CLeWI"] = Method(ER(memory), CLeWI(0.3))
    return Comparison(stream(dataset, limit=limit), SMALL, methods, Training(10, 32, 0.1), seeds)


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
    convnet, small = models.convnet, partial(models.resnet18, width=8)
    er, agem, usual, strong = ER(50), AGEM(50), CLeWI(0.3), CLeWI(0.5)
    long, gentle, short = Training(5, 32, 0.1), Training(5, 32, GENTLE), Training(2, 32, 0.1)
    runs = [
        ("ER", "", convnet, er, None, long),
        ("ER + CLeWI", "", convnet, er, usual, long),
        ("ER + CLeWI", "momentum None", convnet, Cumulative(50), usual, long),
        ("ER + CLeWI", "released statistic", convnet, er, replace(usual, statistic="clewi2024"), long),
        ("A-GEM", "", convnet, agem, None, gentle),
        ("A-GEM + CLeWI", "", convnet, agem, strong, gentle),
        ("A-GEM + CLeWI", "one batch a task", convnet, replace(agem, fill="batch"), strong, gentle),
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
    with Student's interval and verdict, as `contrasts` gives them; `less`, by how much forgetting falls; the published
    gains on each of DATASETS, NaN where there is none; and the learner's own weight_change, fisher_trace and
    plasticity, where the table has them.
    """
    names = dict.fromkeys(table.method)
    pairs = {name: (f"{name} + {kind}", name) for name in names if f"{name} + {kind}" in names}
    own = [column for column in ("weight_change", "fisher_trace", "plasticity") if column in table]
    means: Any = table.groupby("method")[["acc", "forgetting", *own]].mean()
    found: Any = contrasts(table, pairs).rename(columns={"mean": "gain"}).drop(columns="n").rename_axis(None)
    found.insert(0, "alone", means.acc[list(pairs)].to_numpy())
    found["less"] = -contrasts(table, pairs, "forgetting")["mean"]
    acc: Any = released().acc.unstack("dataset")
    for dataset in DATASETS:
        known = {name: acc[dataset][f"{name} + CLeWI"] - acc[dataset][name] for name in PAIRS}
        found[dataset] = [known.get(name, float("nan")) for name in pairs]
    return found.join(means[own])


def curves(seed: int, method: str, profile: str = "fast") -> "pd.DataFrame":
    """Test accuracy along the line of every merge, old network aligned and statistics re-estimated at every point.

    Columns: after (tasks learned); alpha; accuracy, the mean over the tasks seen; new, on the newest of them; old, the
    mean over the others. The run merges at the method's own alpha. Logits are the network's own, uncorrected.
    """
    import pandas as pd

    whole, kind = main(profile, "cifar100" if profile == "paper" else None), "aligned, re-estimated"
    tasks, net, chosen = next(iter(whole.streams.values()))(seed), next(iter(whole.models.values())), whole.methods
    rule, rows = chosen[f"{method} + CLeWI"], []
    training = rule.training or whole.training
    result = run(tasks, net, rule.learner, rule.consolidation, training, seed=seed, progress=False)
    found = landscape.merges(result.model, result.trained, result.weights, result.inputs, tasks, variants=(kind,))
    for after, curve in enumerate((curve[kind] for curve in found), 2):
        for t, accuracy in zip(curve.ts.tolist(), curve.accuracy, strict=True):
            means = {"accuracy": accuracy.mean(), "new": accuracy[-1], "old": accuracy[:-1].mean()}
            rows.append({"after": after, "alpha": t} | {n: float(v) for n, v in means.items()})
    return pd.DataFrame(rows)


def planted(seed: int, epochs: int) -> list[dict[str, Any]]:
    """How far apart two networks may be for a planted permutation to be found again, on synthetic data.

    Ten classes, each a random 8x8 picture under noise. A network that has learned five of them goes on to the other
    five for some `epochs`; its old self is permuted at random and matched with it on 100 inputs of all classes. `found`
    is the share of channels that come back to their place. Columns: kind ("went on", or "began anew" for a network of
    another initialisation, whose channels have no true place), found, similarity.
    """
    tasks, rows = data.split(_pictures(seed), 2), []
    [factory] = SMALL.values()
    one, other = (replace(tasks, tasks=(replace(task, index=0),)) for task in tasks)
    training = Training(epochs=10, batch=32, lr=0.1)
    first = run(one, factory, training=training, seed=seed, progress=False)
    net, old = first.model, first.weights[0]
    x = torch.cat([task.prepare(task.train.x[:50]) for task in tasks])
    symmetry = alignment.symmetry(net, x[:2])
    hidden = alignment.random_permutations(symmetry, torch.Generator().manual_seed(seed))
    begun = {"went on": net, "began anew": factory(tasks, seed=seed + 1000)}
    for kind, start in begun.items():
        further = replace(training, epochs=epochs)
        new = run(other, start, training=further, seed=seed, progress=False).weights[0]
        match = alignment.align(symmetry, net, new, alignment.permute(symmetry, hidden, old), x)
        back = alignment.compose(hidden, match.permutations).values()
        home = torch.cat([p == torch.arange(len(p)) for p in back])
        similar = sum(match.similarity.values()) / len(match.similarity)
        rows.append({"kind": kind, "found": float(home.float().mean()), "similarity": similar})
    return rows


def _gentle(rule: Learner, training: Training | None = None) -> Training | None:
    """The training of a rule with a penalty or a projection, at a laptop's scale; None for the comparison's own."""
    return replace(training or Training(10, 32, 0.1), lr=GENTLE) if isinstance(rule, AGEM | Sum) else None


def _pictures(seed: int) -> data.Dataset:
    """Ten classes of synthetic 8x8 images: a picture of random grey values each, under as much noise."""
    g = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 160, (10, 1, 8, 8), generator=g)

    def examples(count: int) -> data.Examples:
        y = torch.arange(10).repeat_interleave(count)
        noise = torch.randint(0, 96, (len(y), 1, 8, 8), generator=g)
        return data.Examples((pictures[y] + noise).to(torch.uint8), y)

    return data.Dataset("pictures", examples(60), examples(20), tuple("0123456789"), data.Normalize((0.5,), (0.2,)))

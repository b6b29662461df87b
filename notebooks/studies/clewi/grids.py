"""CLeWI's experiments as grids of runs."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from clkit import curvature, data, models, weights
from clkit.consolidation import CLeWI
from clkit.data import Dataset
from clkit.experiments import Comparison, Method
from clkit.experiments.methods import Model
from clkit.learners import (
    AGEM,
    DER,
    ER,
    ERACE,
    EWC,
    GEM,
    L2,
    MAS,
    MIR,
    SI,
    BiC,
    DERpp,
    GDumb,
    ICaRL,
    Joint,
    Learner,
    LwF,
    MemoryOnly,
    OnlineEWC,
    Sum,
)
from clkit.training import Result, Training
from studies.clewi.published import ALPHA, DATASETS, PAIRS, RATE
from studies.named import stream

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}  # of ten classes each, in bytes
GENTLE = 0.03  # the learning rate, at a laptop's scale, of rules with a penalty or a projection; of others it is 0.1


def learners(memory: int, *, beyond: bool = False, fit_epochs: int = 256, ewc: float = 10.0) -> dict[str, Learner]:
    """The paper's methods by name, with `beyond` more rules; those that keep no memory get one to merge by.

    Strengths are the paper's for CIFAR-10: online EWC 10, SI c = 0.5 and xi = 1, DER++ alpha = 0.2 and beta = 0.5.
    """
    beside = MemoryOnly(memory)
    made = {
        "joint": Joint(),
        "fine-tuning": beside,
        "online EWC": Sum(beside, OnlineEWC(ewc)),
        "SI": Sum(beside, SI(0.5, xi=1.0)),
        "iCaRL": ICaRL(memory),
        "GDumb": GDumb(memory, fit_epochs=fit_epochs),
        "ER": ER(memory),
        "A-GEM": AGEM(memory),
        "ER-ACE": ERACE(memory),
        "MIR": MIR(memory, candidates=64),
        "BiC": BiC(memory),
        "DER++": DERpp(memory, alpha=0.2, beta=0.5),
    }
    others = {
        "L2": Sum(beside, L2()),
        "EWC": Sum(beside, EWC(ewc)),
        "MAS": Sum(beside, MAS()),
        "LwF": Sum(beside, LwF()),
        "GEM": GEM(memory),
        "DER": DER(memory, alpha=0.2),
    }
    return made | others if beyond else made


def main(profile: str = "fast", dataset: str | None = None) -> Comparison:
    """The main table: every learner by itself and with CLeWI.

    "fast": digits, a memory of 50, all rules of `learners`, with alpha 0.3 and with alpha searched on held-out memory.
    "paper": the paper's pairs, alphas, learning rates, 50 epochs and seeds, ResNet-18, memory 500, on one of DATASETS.
    """
    if profile == "paper":
        name = dataset or "cifar10"
        place = DATASETS.index(name)
        rules = learners(500, ewc=(10.0, 20.0, 25.0)[place])
        multistep = {"schedule": "multistep", "milestones": (0.7, 0.9)} if name == "cifar100" else {}
        training = Training(epochs=50, batch=32, lr=0.1, **multistep)
        methods = {n: Method(rule, None, replace(training, lr=RATE[n][place])) for n, rule in rules.items()}
        for n in PAIRS:
            rule = DERpp(500, alpha=0.1, beta=0.1) if n == "DER++" else rules[n]
            pair = f"{n} + CLeWI"
            methods[pair] = Method(rule, CLeWI(ALPHA[n][place], points=0), replace(training, lr=RATE[pair][place]))
        return Comparison(stream(name), {"resnet18": models.resnet18}, methods, training, range(43, 48), plasticity)
    training = Training(epochs=10, batch=32, lr=0.1)
    methods = {}
    for n, rule in learners(50, beyond=True, fit_epochs=63).items():
        own = _own(training, rule)
        methods[n] = Method(rule, None, own)
        methods[f"{n} + CLeWI"] = Method(rule, CLeWI(0.3, points=0), own)
        if rule.remembers:
            methods[f"{n} + search"] = Method(rule, CLeWI("search"), own)
    return Comparison(stream(dataset or "digits"), {"convnet": models.convnet}, methods, training, range(5), plasticity)


def reduced(
    dataset: str, *, limit: int, epochs: int, memory: int, ewc: float = 10.0, seeds: Sequence[int] = (0, 1, 2)
) -> Comparison:
    """The paper's main table on `limit` images a class and a small convnet: its pairs at its alphas, one learning rate.

    Alphas are those of CIFAR-100 for cifar100 and of CIFAR-10 for others; the learning rate is 0.1, of rules with a
    penalty or a projection 0.03, the same with and without CLeWI. `ewc` is the strength of online EWC, whose steps
    grow without bound where it is too large for the learning rate.
    """
    place = 1 if dataset == "cifar100" else 0
    training = Training(epochs=epochs, batch=32, lr=0.1)
    methods = {}
    for n, rule in learners(memory, fit_epochs=63, ewc=ewc).items():
        own = _own(training, rule)
        methods[n] = Method(rule, None, own)
        if n in PAIRS:
            methods[f"{n} + CLeWI"] = Method(rule, CLeWI(ALPHA[n][place], points=0), own)
    small = {"convnet 16-32-32": partial(models.convnet, widths=(16, 32, 32))}
    return Comparison(stream(dataset, limit=limit), small, methods, training, seeds)


def number_of_tasks(profile: str = "fast") -> Comparison:
    """The same classes in 5, 10 and 20 tasks: CIFAR-100, or 20 rendered letters."""
    if profile == "paper":
        whole = main("paper", "cifar100")
        chosen = {n: whole.methods[n] for n in whole.methods if n == "ER + CLeWI" or "CLeWI" not in n}
        streams = {k: v for count in (5, 10, 20) for k, v in stream("cifar100", count).items()}
        return replace(whole, streams=streams, methods=chosen)
    rules = learners(100)
    methods = {n: Method(rules[n]) for n in ("fine-tuning", "ER", "ER-ACE", "DER++", "iCaRL")}
    methods["ER + CLeWI"] = Method(rules["ER"], CLeWI(0.3, points=0))
    methods["ER + search"] = Method(rules["ER"], CLeWI("search"))
    streams = {k: v for count in (5, 10, 20) for k, v in stream("letters", count).items()}
    return Comparison(streams, {"convnet": models.convnet}, methods, Training(10, 32, 0.1), range(3))


def alphas(profile: str = "fast") -> Comparison:
    """How alpha may be chosen: fixed, on a schedule, by search, and merging only where it helps; with ER."""
    (memory, _), merges = _usual(profile), 9 if profile == "paper" else 4
    fixed = [i / 10 for i in range(1, 8)]
    chosen: dict[str, CLeWI] = {f"fixed {a}": CLeWI(a, points=0) for a in fixed}
    chosen["rising 0.2 + 0.05 a task"] = CLeWI(tuple(round(0.2 + 0.05 * i, 2) for i in range(merges)), points=0)
    chosen["equal parts 1 - 1 / tasks"] = CLeWI(tuple(round(1 - 1 / (i + 2), 4) for i in range(merges)), points=0)
    chosen["searched"] = CLeWI("search")
    for a in (0.3, 0.5):
        chosen[f"fixed {a}, a fifth held out"] = CLeWI(a, points=0, holdout=0.2)
        chosen[f"fixed {a}, if it helps"] = CLeWI(a, points=0, when="helps")
    methods = {"ER": Method(ER(memory))} | {n: Method(ER(memory), rule) for n, rule in chosen.items()}
    return _small(profile, methods)


def no_rehearsal(profile: str = "fast") -> Comparison:
    """Fine-tuning with CLeWI at several alphas: the memory serves matching and re-estimation alone."""
    rule = MemoryOnly(_usual(profile)[0])
    found = {f"alpha {a}": Method(rule, CLeWI(a, points=0)) for a in (0.2, 0.3, 0.5, 0.6, 0.7, 0.8)}
    grid = _small(profile, {"fine-tuning": Method(rule)} | found)
    return replace(grid, training=replace(grid.training, lr=0.03))


def width(profile: str = "fast") -> Comparison:
    """The same network one, two and four times as wide."""
    if profile == "paper":
        made: Mapping[str, Model] = {f"x{k}": partial(models.resnet18, width=64 * k) for k in (1, 2, 4)}
    else:
        made = {f"x{k}": partial(models.convnet, widths=(8 * k, 16 * k, 16 * k)) for k in (1, 2, 4)}
    memory, alpha = _usual(profile)
    er, der = ER(memory), DERpp(memory, alpha=0.2, beta=0.5)
    methods = {"ER": Method(er), "ER + CLeWI": Method(er, CLeWI(alpha, points=0))}
    methods |= {"DER++": Method(der), "DER++ + CLeWI": Method(der, CLeWI(0.2, points=0))}
    return replace(_small(profile, methods), models=made)


def memory_size(profile: str = "fast") -> Comparison:
    """ER with and without CLeWI while the memory grows."""
    sizes = (200, 500, 1000, 2000) if profile == "paper" else (20, 50, 100, 200, 500)
    _, alpha = _usual(profile)
    pairs = {f"ER {m}": Method(ER(m)) for m in sizes}
    pairs |= {f"ER + CLeWI {m}": Method(ER(m), CLeWI(alpha, points=0)) for m in sizes}
    return _small(profile, pairs | {f"ER + search {m}": Method(ER(m), CLeWI("search")) for m in sizes})


def equal_bytes(dataset: str, memory: int, *, limit: int | None = None, seeds: Sequence[int] = (0, 1, 2)) -> Comparison:
    """CLeWI with a memory against ER whose memory may also have the bytes of the second network that CLeWI keeps."""
    made, shape = partial(models.convnet, widths=(16, 32, 32)), SHAPES[dataset]
    blank = data.Examples(torch.zeros(10, *shape, dtype=torch.uint8), torch.arange(10))
    net = made(data.split(Dataset("blank", blank, blank, tuple("0123456789")), 1), seed=0)
    total = memory + sum(t.nbytes for t in weights.get_weights(net).values()) // (blank.x[0].nbytes + 1)
    methods = {f"ER {memory}": Method(ER(memory)), f"ER {total}": Method(ER(total))}
    methods[f"ER {memory} + CLeWI"] = Method(ER(memory), CLeWI(0.3, points=0))
    return Comparison(stream(dataset, limit=limit), {"convnet 16-32-32": made}, methods, Training(10, 32, 0.1), seeds)


def parts(profile: str = "fast") -> Comparison:
    """What each part of CLeWI adds: permutation and re-estimation on and off, and matching by weights; with ER."""
    memory, alpha = _usual(profile)
    rule = ER(memory)
    settings = {
        "ER + CLeWI": {},
        "no permutation": {"align": None},
        "no re-estimation": {"refresh": False},
        "neither": {"align": None, "refresh": False},
        "matched by weights": {"align": "weights"},
        "released statistic": {"statistic": "clewi2024"},
    }
    methods = {n: Method(rule, CLeWI(alpha, points=0, **options)) for n, options in settings.items()}
    return _small(profile, {"ER": Method(rule)} | methods)


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
        traces.append(
            curvature.diagonal_trace(curvature.fisher(net, result.inputs[t][:100].to(device), labels="exact"))
        )
    found = [report["alpha"] for report in result.reports if report]
    return {
        "weight_change": float(torch.tensor(changes).mean()),
        "fisher_trace": float(torch.tensor(traces).mean()),
        "masked": float(result.masked[-1].mean()),
        "alpha": sum(found) / len(found) if found else float("nan"),
    }


def _usual(profile: str) -> tuple[int, float]:
    """The memory and the alpha of the smaller studies."""
    return (500, 0.5) if profile == "paper" else (50, 0.3)


def _own(training: Training, rule: Learner) -> Training | None:
    """The training of a rule with a penalty or a projection, at a laptop's scale; None for the grid's own."""
    return replace(training, lr=GENTLE) if isinstance(rule, AGEM | Sum) else None


def _small(profile: str, methods: Mapping[str, Method]) -> Comparison:
    """The setting of the smaller studies: digits and the convnet, or CIFAR-100 in ten tasks with ResNet-18."""
    if profile == "paper":
        grid = main("paper", "cifar100")
        training = replace(grid.training, lr=0.1)
        return replace(grid, methods=methods, training=training, seeds=range(43, 46), measure=None)
    return Comparison(stream("digits"), {"convnet": models.convnet}, methods, Training(10, 32, 0.1), range(5))

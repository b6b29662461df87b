"""AWM's experiments as grids of runs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from clkit import data
from clkit.data import Dataset, Normalize, Stream
from clkit.data.core import Scenario
from clkit.experiments.awm.backbones import BACKBONES, pretrained
from clkit.experiments.grid import Grid
from clkit.experiments.plan import Method
from clkit.learners import EWC, Learner, LwF, PerTask
from clkit.modulation import LowRank, Mask, Modulated, Modulation, Own, Rule, modulated
from clkit.training import ModelFactory, Result, Training

if TYPE_CHECKING:
    import pandas as pd

SCRIPTS = ("greek", "cyrillic", "armenian", "georgian", "arrows", "math")
CLASSES, TRAINED, TESTED, SIZE = 20, 24, 12, 28
SQUARE = (1, 2, 3, 4, 5, 6, 8)
RECTANGULAR = ((2, 8), (8, 2), (4, 8), (8, 4))
RANK, RANKS = 2, {"resnet18": 2, "vit": 3}
"""Ranks at which a low-rank addition has about as many parameters as AWM 4."""
RATES = {"AWM": 1e-2, "mask": 1e-3, "low rank": 3e-3, "classifier": 1e-2, "norms": 1e-2, "full": 1e-3}
STRENGTHS = {"EWC": 10.0, "LwF": 1.0}
"""The learning rates and strengths of `tuning` with the highest accuracy on held-out examples."""
TRAINING = Training(
    epochs=8, batch=32, lr=1e-2, optimizer="adamw", schedule="multistep", milestones=(0.5,), channels_last=True
)
PER_TASK = PerTask()


@cache
def script(name: str, part: str = "test") -> Dataset:
    """Twenty evenly spaced characters of a script: per class 24 examples to train on, 12 to test on, 28 x 28 pixels.

    `part` "test" has the test examples; "held out" has as many others in their place, to choose settings by.
    """
    if part not in ("test", "held out"):
        raise ValueError(f"part: {part!r} is unknown; choose 'test' or 'held out'")
    known = data.glyphs(name, per_class=1, size=SIZE).classes
    rows = torch.linspace(0, len(known) - 1, CLASSES).long()
    full = data.glyphs(characters="".join(known[i] for i in rows), per_class=4 * TESTED, size=SIZE)
    number = torch.arange(len(full.train)) % (4 * TESTED)
    train, held_out = full.train[number < TRAINED], full.train[(number >= TRAINED) & (number < TRAINED + TESTED)]
    return replace(full, name=name, train=train, test=full.test if part == "test" else held_out)


def scripts(names: Sequence[str] = SCRIPTS, part: str = "test", scenario: Scenario = "task") -> Stream:
    """Scripts as tasks, prepared as the Latin glyphs that the backbones know; by default the script is given."""
    return data.series({name: script(name, part) for name in names}, scenario=scenario, normalize=_latin())


def backbone(stream: Stream, name: str = "mobilenet_v2", *, seed: int = 0) -> nn.Module:
    """A pretrained backbone with a fresh head, drawn by `seed`, for the classes of a stream."""
    net = pretrained(name)
    head = Modulated(net, None).head
    width = cast(nn.Linear, net.get_submodule(head)).in_features
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net.set_submodule(head, nn.Linear(width, len(stream.classes)))
    return net


def per_task(
    rule: Rule | None, lr: float, *, net: str = "mobilenet_v2", learner: Learner = PER_TASK, **options: Any
) -> Method:
    """A method whose tasks each have tensors of their own, trained at a learning rate."""
    model = partial(modulated, model=partial(backbone, name=net), rule=rule, **options)
    return Method(learner, None, replace(TRAINING, lr=lr), model)


def baselines(net: str = "mobilenet_v2", rank: int = RANK) -> dict[str, Method]:
    """What adaptive weight modulation is compared with, each at its own learning rate."""
    return {
        "classifier, statistics frozen": per_task(None, RATES["classifier"], net=net, statistics="frozen"),
        "classifier": per_task(None, RATES["classifier"], net=net),
        "norms": per_task(None, RATES["norms"], net=net, affine=True),
        f"low rank {rank}": per_task(LowRank(rank), RATES["low rank"], net=net),
        "mask": per_task(Mask(), RATES["mask"], net=net),
        "full": per_task(Own(), RATES["full"], net=net),
    }


def modulations(net: str, factors: Sequence[int | tuple[int, int]], **options: Any) -> dict[str, Method]:
    """Adaptive weight modulation by factors, the same for both axes or a pair."""
    made = {}
    for factor in factors:
        m1, m2 = factor if isinstance(factor, tuple) else (factor, factor)
        name = f"AWM {factor}" if m1 == m2 else f"AWM {m1}x{m2}"
        made[name] = per_task(Modulation(m1, m2, **options), RATES["AWM"], net=net)
    return made


def tuning() -> Grid:
    """The learning rate of every method and the strengths of EWC and LwF, judged on held-out examples."""
    tried: dict[str, tuple[Rule | None, Sequence[float]]] = {
        "AWM": (Modulation(4, 4), (3e-3, 1e-2, 3e-2)),
        "mask": (Mask(), (1e-4, 1e-3, 3e-3, 1e-2)),
        "low rank": (LowRank(RANK), (1e-3, 3e-3, 1e-2)),
        "classifier": (None, (3e-3, 1e-2, 3e-2)),
        "full": (Own(), (3e-4, 1e-3, 3e-3)),
    }
    methods = {f"{n} lr={lr:g}": per_task(rule, lr) for n, (rule, rates) in tried.items() for lr in rates}
    methods |= {f"norms lr={lr:g}": per_task(None, lr, affine=True) for lr in tried["classifier"][1]}
    for strength in (1.0, 10.0, 100.0):
        methods[f"EWC λ={strength:g}"] = sequential(EWC(strength))
        methods[f"LwF λ={strength / 10:g}"] = sequential(LwF(strength / 10))
    return Grid({"six scripts, held out": partial(scripts_of, part="held out")}, NETS, methods, TRAINING, (0,))


def table() -> Grid:
    """The accuracy table: AWM and its baselines on six scripts, with Piggyback's mask at its published rate too."""
    methods = baselines() | modulations("mobilenet_v2", (4, 2))
    methods["mask, published rate"] = per_task(Mask(), 1e-4)
    return Grid(STREAMS, NETS, methods, TRAINING, range(3))


def forgetting() -> Grid:
    """What is left of each script while others are learned: AWM, and one network that goes on."""
    methods = modulations("mobilenet_v2", (4,))
    methods |= {"fine-tuning": sequential(Learner()), "EWC": sequential(EWC(STRENGTHS["EWC"]))}
    methods["LwF"] = sequential(LwF(STRENGTHS["LwF"]))
    streams = {"latin and six scripts": partial(scripts_of, names=("latin", *SCRIPTS))}
    return Grid(streams, NETS, methods, TRAINING, range(3))


def factors() -> Grid:
    """Accuracy over the number of parameters; variants of interpolation, start, layout and storage beside it."""
    net, made = "mobilenet_v2", modulations("mobilenet_v2", (*SQUARE, *RECTANGULAR))
    variants: dict[str, dict[str, Any]] = {
        "reviewed": {"layout": "reviewed"},
        "shuffled": {"shuffle": 0},
        "nearest": {"interpolation": "nearest"},
        "bilinear": {"interpolation": "bilinear"},
        "kaiming": {"init": "kaiming"},
    }
    for name, options in variants.items():
        for m in (2, 4, 8) if name in ("reviewed", "shuffled") else (4,):
            made[f"AWM {m}, {name}"] = per_task(Modulation(m, m, **options), RATES["AWM"], net=net)
    for m in (2, 4, 8, 16):
        made[f"grid {m}"] = per_task(Modulation(m, m, mode="grid"), RATES["AWM"], net=net)
    made["AWM 4, float16"] = per_task(Modulation(4, 4, store="float16"), RATES["AWM"], net=net)
    made["AWM 2x4, int8"] = per_task(Modulation(2, 4, store="int8"), RATES["AWM"], net=net)
    made["mask"] = baselines()["mask"]
    return Grid(STREAMS, NETS, made, TRAINING, range(2))


def which_part() -> Grid:
    """What does the work: head and statistics alone, gains on pointwise or on depthwise convolutions alone, on all."""
    names = {n: p.shape for n, p in pretrained().named_parameters() if p.ndim == 4}
    depthwise = tuple(n for n, shape in names.items() if shape[1] == 1 and shape[2] > 1)
    pointwise = tuple(n for n, shape in names.items() if shape[2] == 1)
    methods = {n: baselines()[n] for n in ("classifier, statistics frozen", "classifier", "norms")}
    for name, layers in {"depthwise": depthwise, "pointwise": pointwise}.items():
        methods[f"AWM 4, {name} alone"] = per_task(Modulation(4, 4), RATES["AWM"], layers=layers)
    methods["AWM 4, statistics frozen"] = per_task(Modulation(4, 4), RATES["AWM"], statistics="frozen")
    methods |= modulations("mobilenet_v2", (4,))
    return Grid(STREAMS, NETS, methods, TRAINING, range(2))


def architectures() -> Grid:
    """AWM and its baselines on a residual network and a vision transformer."""
    methods = {}
    for net, rank in RANKS.items():
        made = baselines(net, rank) | modulations(net, (1, 2, 4, 8))
        methods |= {f"{net}: {name}": method for name, method in made.items()}
    return Grid(STREAMS, NETS, methods, TRAINING, range(2))


def transfer() -> Grid:
    """Where a task's gains start, with little training: at the backbone, the previous script, or the nearest one."""
    short = {
        begin: per_task(Modulation(4, 4), RATES["AWM"], learner=PerTask(begin=begin))
        for begin in ("backbone", "previous", "nearest")
    }
    methods = {
        f"{name}, {epochs} epochs": replace(method, training=replace(TRAINING, lr=RATES["AWM"], epochs=epochs))
        for name, method in short.items()
        for epochs in (1, 2, 4)
    }
    return Grid(STREAMS, NETS, methods, TRAINING, range(2))


def inferred() -> Grid:
    """The same with the task not given: found by the entropy of the answers or by BatchNorm's statistics."""
    method = modulations("mobilenet_v2", (4,))["AWM 4"]
    methods = {infer: replace(method, learner=PerTask(infer=infer)) for infer in ("entropy", "statistics")}
    streams = {"six scripts, not given": partial(scripts_of, scenario="class")}
    return Grid(streams, NETS, methods, TRAINING, range(2))


def long() -> Grid:
    """Forty tasks of seven or eight characters each, from all scripts."""
    methods = modulations("mobilenet_v2", (4,)) | {"fine-tuning": sequential(Learner())}
    short = {name: replace(m, training=replace(m.training or TRAINING, epochs=5)) for name, m in methods.items()}
    return Grid({"40 tasks": characters}, NETS, short, TRAINING, (0,), pace)


def sequential(learner: Learner) -> Method:
    """A learner on one network for all tasks, with a head for each."""
    return Method(learner, None, replace(TRAINING, lr=RATES["full"], labels="task"))


def scripts_of(seed: int, names: Sequence[str] = SCRIPTS, part: str = "test", scenario: Scenario = "task") -> Stream:
    """`scripts` for a grid: the seed changes the order of training and the heads, not the data."""
    return scripts(names, part, scenario)


def characters(seed: int = 0, tasks: int = 40) -> Stream:
    """Characters of all scripts but Latin, look-alikes left out, in tasks of equal size; prepared as for `scripts`."""
    full = data.glyphs([*SCRIPTS, "digits"], per_class=TRAINED, size=SIZE)
    return data.split(replace(full, normalize=_latin()), tasks, scenario="task")


def pace(result: Result) -> dict[str, Any]:
    """How many steps each task took until the mean loss of ten steps was below a quarter of its first; -1 for never."""
    steps = []
    for loss in result.training_loss:
        smooth = np.convolve(loss, np.ones(10) / 10, "valid")
        below = np.flatnonzero(smooth < loss[0] / 4)
        steps.append(int(below[0]) + 10 if len(below) else -1)
    return {"steps": steps, "own": np.diag(result.accuracy).tolist(), "end": result.accuracy[-1].tolist()}


def costs(grid: Grid) -> "pd.DataFrame":
    """What a task of each method stores on the backbone: numbers trained and bytes, without and with the head."""
    import pandas as pd

    rows = []
    for name, method in grid.methods.items():
        if not isinstance(method.learner, PerTask) or method.model is None:
            continue
        net = cast(Modulated, cast(ModelFactory, method.model)(next(iter(grid.streams.values()))(0), seed=0))
        counts = net.parameters_per_task(CLASSES)
        head = 4 * counts["head"]
        row = {"method": name, "gains": counts["gains"], "affine": counts["affine"], "statistics": counts["statistics"]}
        stored = net.bytes_per_task(CLASSES)
        rows.append(row | {"bytes": stored - head, "bytes with head": stored})
    return pd.DataFrame(rows)


def _latin() -> Normalize:
    return BACKBONES["mobilenet_v2"].stream()[0].normalize


STREAMS: Mapping[str, Any] = {"six scripts": scripts_of}
NETS: Mapping[str, Any] = {"mobilenet_v2": backbone}

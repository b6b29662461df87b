"""The experiments of adaptive weight modulation, AWM (arXiv 2311.15276), at a laptop's scale and at the paper's.

The tasks are scripts of glyphs; the backbones have learned Latin ones, without a download. They are trained when first
asked for, in one to two minutes on one core, and read from `backbones/` in the cache from then on. All 52 letters are
kept: at their natural sizes most of o/O, c/C, s/S can be told apart, and the networks reach 0.98 to 0.99.

```python
whole = awm.table()
table = page.table(whole, "table", whole.matrices)
awm.costs(whole)                               # what a task of each method keeps
```
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from clkit import checks, data, models
from clkit.data import Augment, Dataset, Examples, Normalize, Stream
from clkit.data.core import changed
from clkit.data.streams import Disjoint
from clkit.experiments import Comparison, Method
from clkit.learners import EWC, Learner, LwF, PerTask
from clkit.modulation import LowRank, Mask, Modulated, Modulation, Own, Rule, modulated
from clkit.training import ModelFactory, Result, Training
from studies.named import dataset, drawn
from studies.pretraining import Recipe, restored

if TYPE_CHECKING:
    import pandas as pd

SCRIPTS = ("greek", "cyrillic", "armenian", "georgian", "arrows", "math")
PAPER = ("stanford_cars", "cub200", "flowers102", "food101", "sketches", "wikiart")
CLASSES, TRAINED, TESTED, SIZE = 20, 24, 12, 28
IMAGENET = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FACTORS = (1, 2, 3, 4, 6, 8, (4, 8))
TUNED_ON = ("greek", "georgian", "math")
RANK, RANKS = 2, {"resnet18": 2, "vit": 3}
"""Ranks at which a low-rank addition has about as many parameters as AWM 4."""
CHOSEN = tomllib.loads(Path(__file__).with_name("published").joinpath("awm.toml").read_text())
RATES, STRENGTHS = CHOSEN["lr"], CHOSEN["strength"]
PARAMETERS = {(m1, m2): count for m1, m2, count in CHOSEN["parameters"]["by_factors"]}
"""Modulation parameters a task of MobileNetV2 by factors, of 2,189,760 convolution weights, as published."""
TRAINING = Training(
    epochs=6, batch=32, lr=1e-2, optimizer="adamw", schedule="multistep", milestones=(0.5,), channels_last=True
)
LONG = replace(TRAINING, epochs=30)
PRETRAINED = partial(models.torchvision, name="mobilenet_v2", weights="IMAGENET1K_V1")
LITE0 = partial(models.efficientnet_lite0, size=64)
FEW = replace(TRAINING, epochs=10)
QUICK = replace(TRAINING, epochs=5, batch=48)
REAL = ("pacs48/photo", "pacs48/art_painting", "pacs48/cartoon", "pacs48/sketch", "cifar10", "usps")
IMAGES, TEST_IMAGES = 140, 280  # of a real set: those that are trained on, and that are tested on


def latin(seed: int = 0, *, per_class: int = 480, size: int = 28) -> data.Stream:
    """Latin glyphs as one task."""
    return data.split(data.glyphs("latin", per_class=per_class, size=size, seed=seed), 1)


COSINE = Training(optimizer="adamw", weight_decay=0.01, schedule="cosine", warmup=0.1, channels_last=True)
BACKBONES = {
    "convnet": Recipe(
        partial(models.convnet, widths=(16, 32, 32)), replace(COSINE, epochs=6, lr=2e-2), partial(latin, per_class=60)
    ),
    "mobilenet_v2": Recipe(
        partial(models.torchvision, name="mobilenet_v2", width_mult=0.35),
        replace(COSINE, epochs=5, batch=128, lr=2e-2),
        latin,
    ),
    "resnet18": Recipe(
        partial(models.resnet18, width=8), replace(COSINE, epochs=3, batch=128, lr=2e-2), partial(latin, per_class=300)
    ),
    "vit": Recipe(
        partial(models.vit, patch=7, dim=64, depth=4),
        replace(COSINE, epochs=6, batch=64, lr=3e-3, channels_last=False),
        latin,
    ),
}


def pretrained(name: str = "mobilenet_v2", *, seed: int = 0) -> nn.Module:
    """A network that has learned Latin glyphs, on the CPU and in training mode, with a head for the 52 letters.

    `name` is one of `BACKBONES`: torchvision's MobileNetV2 at 0.35 of its width, `models.resnet18` of width 8,
    `models.vit`, or, in seconds and less well, `models.convnet`. `seed` sets the images, their order and the initial
    weights. The network is trained when it is first asked for; what is kept belongs to the data, the architecture, the
    training, the seed, clkit's code and torch's version, so that a change of any makes another backbone. The caller
    may change the network, which is its own.
    Raises ValueError for an unknown name. MobileNetV2 keeps torchvision's five strides of 2: images of 28 x 28 become
    maps of 14, 7, 4, 2 and 1 pixels a side.
    """
    return restored(BACKBONES[checks.choice("name", name, BACKBONES)], seed)[0]


def untrained(name: str = "mobilenet_v2") -> nn.Module:
    """The network of a backbone with initial weights, to count by; in no time."""
    return BACKBONES[name].build(latin(per_class=1), seed=0)


def pretrained_accuracy(name: str = "mobilenet_v2", *, seed: int = 0) -> float:
    """The accuracy on the test glyphs of Latin, in [0, 1], that the backbone reached when it was trained."""
    return restored(BACKBONES[checks.choice("name", name, BACKBONES)], seed)[1]["accuracy"]


@cache
@checks.arguments
def script(name: str, part: Literal["test", "held out"] = "test", seed: int | None = None) -> Dataset:
    """Twenty evenly spaced characters of a script, or ten that a seed draws: per class 24 examples to train on, 12 to
    test on, 28 x 28 pixels, rendered as the seed says.

    `part` "test" has the test examples; "held out" has as many others in their place, to choose settings by.
    """
    known = data.glyphs(name, per_class=1, size=SIZE).classes
    rows = torch.linspace(0, len(known) - 1, CLASSES).long()
    if seed is not None:
        rows = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[: CLASSES // 2].sort().values
    some = "".join(known[i] for i in rows)
    full = data.glyphs(characters=some, per_class=4 * TESTED, size=SIZE, seed=seed or 0)
    number = torch.arange(len(full.train)) % (4 * TESTED)
    train, held_out = full.train[number < TRAINED], full.train[(number >= TRAINED) & (number < TRAINED + TESTED)]
    return replace(full, name=name, train=train, test=full.test if part == "test" else held_out)


def order(seed: int) -> list[str]:
    """The six scripts in the order of a seed."""
    return [SCRIPTS[i] for i in torch.randperm(len(SCRIPTS), generator=torch.Generator().manual_seed(seed))]


def drawn_scripts(seed: int, part: Any = "test") -> Stream:
    """Ten characters of each script as tasks: the seed draws characters, images and the order of the scripts."""
    made = {name: script(name, part, seed) for name in order(seed)}
    return data.series(made, scenario="task", normalize=_latin())


def scripts(names: Sequence[str] = SCRIPTS, part: Any = "test", scenario: Disjoint = "task") -> Stream:
    """Scripts as tasks, prepared as the Latin glyphs that the backbones know; by default the script is given."""
    return data.series({name: script(name, part) for name in names}, scenario=scenario, normalize=_latin())


def characters(tasks: int = 40) -> Stream:
    """Characters of all scripts but Latin, look-alikes left out, in tasks of equal size; prepared as for `scripts`."""
    full = data.glyphs([*SCRIPTS, "digits"], per_class=TRAINED, size=SIZE)
    return data.split(replace(full, normalize=_latin()), tasks, scenario="task")


def pictures(names: Sequence[str] = PAPER, *, size: int = 224, limit: int | None = None) -> Stream:
    """Real image sets as tasks, in colour, `size` pixels square, normalised as ImageNet is.

    Names are those of `data.load`, and `limit` is a number of images a class. Training images are cropped and mirrored
    at random, but for digits. The paper does not tell its preprocessing: torchvision's sets are cut to their central
    square where Piggyback cuts out of 256 pixels.
    """
    return data.series({name: _pictures(name, size, limit) for name in names}, normalize=IMAGENET)


def _pictures(name: str, size: int, limit: int | None) -> Dataset:
    digits = name.startswith(("mnist", "usps"))
    augment = Augment(crop=size // 8, flip=not digits)
    full = data.load(name, size=size, limit=limit, augment=augment)
    return changed(full, lambda part: Examples(part.x.expand(-1, 3, -1, -1), part.y))  # in colour


def few(seed: int, name: str, held_out: bool = False) -> Stream:
    """A real image set as one task: `IMAGES` to train on, of every class as many, and `TEST_IMAGES` of its test images.

    The seed draws them. With `held_out` other training images are in the place of the test images, to choose settings
    by.
    """
    known = dataset(name)
    count = IMAGES // len(known.classes)
    both = drawn(name, seed, 2 * count).train
    first = torch.cat([torch.arange(n) for n in both.y.bincount().tolist()]) < count  # they come class by class
    rows = torch.randperm(len(known.test), generator=torch.Generator().manual_seed(seed))[:TEST_IMAGES]
    augment = Augment(crop=known.train.x.shape[-1] // 8, flip=name != "usps")
    test = both[~first] if held_out else known.test[rows]
    return data.split(replace(known, train=both[first], test=test, augment=augment), 1, scenario="task")


def kept(result: Result) -> dict[str, Any]:
    """What a task keeps, in bytes, and the mean loss in each epoch of its training."""
    losses = np.array_split(result.training_loss[0], min(FEW.epochs, len(result.training_loss[0])))
    return {"bytes": cast(PerTask, result.learner).tasks[0].nbytes, "losses": [float(part.mean()) for part in losses]}


PER_TASK = PerTask()


def backbone(stream: Stream, name: str = "mobilenet_v2", *, seed: int = 0) -> nn.Module:
    """A pretrained backbone with a fresh head, drawn by `seed`, for the classes of a stream."""
    net = pretrained(name)
    head = Modulated(net, None).head
    width = cast(nn.Linear, net.get_submodule(head)).in_features
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net.set_submodule(head, nn.Linear(width, len(stream.classes)))
    return net


OTHERS: dict[str, tuple[ModelFactory, Training]] = {
    "ImageNet": (PRETRAINED, LONG),
    "lite0": (LITE0, FEW),
    "drawn": (partial(backbone, name="mobilenet_v2"), QUICK),
}
"""Networks that ImageNet pretrained, MobileNetV2 and EfficientNet-Lite0, and that of `main`, with their training."""


def per_task(
    rule: Rule | None,
    lr: float,
    *,
    net: str = "mobilenet_v2",
    learner: Learner = PER_TASK,
    epochs: int | None = None,
    **options: Any,
) -> Method:
    """A method whose tasks each have tensors of their own, trained at a learning rate.

    `net` is a pretrained backbone by name, or one of `OTHERS`.
    """
    made, long = OTHERS.get(net) or (partial(backbone, name=net), TRAINING)
    training = replace(long, lr=lr)
    training = training if epochs is None else replace(training, epochs=epochs)
    return Method(learner, None, training, partial(modulated, model=made, rule=rule, **options))


def baselines(net: str = "mobilenet_v2", rank: int = RANK) -> dict[str, Method]:
    """What adaptive weight modulation is compared with, each at its own learning rate."""
    rates = _rates(net)
    return {
        "classifier, statistics frozen": per_task(None, rates["classifier"], net=net, statistics="frozen"),
        "classifier": per_task(None, rates["classifier"], net=net),
        "norms": per_task(None, rates["norms"], net=net, affine=True),
        f"low rank {rank}": per_task(LowRank(rank), rates["low rank"], net=net),
        "mask": per_task(Mask(), rates["mask"], net=net),
        "full": per_task(Own(), rates["full"], net=net),
    }


@dataclass(frozen=True)
class Scaled(Modulation):
    """Modulation by 1 - scale G(M): Adam's steps on M count `scale` times."""

    scale: float = 1.0

    def expand(self, m: Tensor, shape: Sequence[int], matrices: Mapping[str, Tensor] | None = None) -> Tensor:
        """scale G(M)."""
        return super().expand(self.scale * m, shape, matrices)


def gains(m: float, head: float, factor: int = 4, net: str = "mobilenet_v2") -> Method:
    """AWM with a learning rate for M and one for the rest."""
    return per_task(Scaled(factor, factor, scale=m / head), head, net=net)


def masks(score: float, head: float, net: str = "mobilenet_v2") -> Method:
    """Piggyback's masks with a learning rate for the scores and one for the rest.

    Adam's steps do not depend on the scale of a gradient: scores and threshold that are k times as large, at k times
    the rate, give the same masks.
    """
    scale = head / score
    return per_task(Mask(1e-2 * scale, 5e-3 * scale), head, net=net)


def modulations(net: str, factors: Sequence[int | tuple[int, int]]) -> dict[str, Method]:
    """Adaptive weight modulation by factors, the same for both axes or a pair."""
    rates, made = _rates(net), {}
    for factor in factors:
        m1, m2 = factor if isinstance(factor, tuple) else (factor, factor)
        name = f"AWM {factor}" if m1 == m2 else f"AWM {m1}x{m2}"
        made[name] = per_task(Modulation(m1, m2), rates["AWM"], net=net)
    return made


def real(part: str = "main") -> Comparison:
    """Six real image sets, each a task of its own, on ImageNet's EfficientNet-Lite0 at 64 pixels; a row a set.

    The seed draws images, heads and orders. Sets are trained apart, which is what a sequence of them would be, bit for
    bit. `part`: "main", five seeds; "more", further factors and baselines, two; "tuning", on other images.
    """
    if part == "tuning":
        streams = {name: partial(few, name=name, held_out=True) for name in REAL[3:5]}
        return Comparison(streams, {"lite0": LITE0}, tried("lite0"), FEW, (100,), kept)
    made = baselines("lite0") | modulations("lite0", (4, 1, 2, 8))
    pairs = CHOSEN["pairs_real"]
    made |= {
        "AWM 4, two rates": gains(*pairs["AWM"], net="lite0"),
        "mask, two rates": masks(*pairs["mask"], net="lite0"),
    }
    more = ("classifier", "low rank 2", "AWM 1", "AWM 2", "AWM 8")
    methods = {name: method for name, method in made.items() if (name in more) == (part == "more")}
    streams = {name: partial(few, name=name) for name in REAL}
    return Comparison(streams, {"lite0": LITE0}, methods, FEW, range(2 if part == "more" else 5), kept)


def tried(net: str = "mobilenet_v2") -> dict[str, Method]:
    """Every rule at the learning rates to choose from, one for all of its tensors or one for the head apart."""
    grid = CHOSEN["tried"][net]
    rules = {"AWM": Modulation(4, 4), "mask": Mask(), "low rank": LowRank(RANK), "full": Own()}
    methods = {}
    for name, rates in grid["lr"].items():
        options: dict[str, Any] = {"affine": True} if name == "norms" else {}
        methods |= {f"{name} lr={lr:g}": per_task(rules.get(name), lr, net=net, **options) for lr in rates}
    methods |= {f"mask scores={s:g} head={head:g}": masks(s, head, net) for s, head in grid["mask"]}
    return methods | {f"AWM M={m:g} head={head:g}": gains(m, head, net=net) for m, head in grid["AWM"]}


def tuning() -> Comparison:
    """The learning rate of every method and the strengths of EWC and LwF, judged on held-out examples."""
    methods = tried()
    methods |= {f"EWC λ={s:g}": sequential(EWC(s, samples=200)) for s in (10.0, 100.0, 1e3, 1e4)}
    methods |= {f"LwF λ={s:g}": sequential(LwF(s)) for s in (0.1, 0.3, 1.0, 10.0)}
    methods |= {f"EWC, frozen, λ={s:g}": sequential(EWC(s, samples=200), frozen=True) for s in (100.0, 1e3, 1e4)}
    methods |= {f"LwF, frozen, λ={s:g}": sequential(LwF(s), frozen=True) for s in (0.1, 0.3, 1.0, 3.0)}
    streams = {"three scripts, held out": partial(scripts_of, names=TUNED_ON, part="held out")}
    return Comparison(streams, NETS, methods, TRAINING, (0,))


def main() -> Comparison:
    """AWM at three factors and its baselines on six scripts; the seed draws characters, images, order and heads."""
    made, pairs = baselines("drawn") | modulations("drawn", (4, 2, 8)), CHOSEN["pairs_drawn"]
    methods = {name: made[name] for name in ("AWM 4", "mask", "norms", "full", "AWM 2", "AWM 8")}
    methods["AWM 4, two rates"] = gains(*pairs["AWM"], net="drawn")
    methods["mask, two rates"] = masks(*pairs["mask"], net="drawn")
    methods["AWM 4, shuffled"] = per_task(Modulation(4, 4, shuffle=0), _rates("drawn")["AWM"], net="drawn")
    lwf = sequential(LwF(STRENGTHS["LwF, frozen"]), frozen=True)
    methods["LwF, frozen"] = replace(lwf, training=replace(QUICK, lr=RATES["sequential"], labels="task"))
    return Comparison({"six scripts, drawn": drawn_scripts}, NETS, methods, QUICK, range(5))


def main_tuning() -> Comparison:
    """The learning rates of `main`, on held-out images of another seed."""
    streams = {"held out": partial(drawn_scripts, part="held out")}
    return Comparison(streams, NETS, tried("drawn"), QUICK, (100,))


def sets(table: "pd.DataFrame") -> "pd.DataFrame":
    """A row for each script of runs of `main` with their matrices: method, seed, set, and its accuracy when learned."""
    import pandas as pd

    rows = [
        {"method": method, "seed": seed, "set": name, "acc": matrix[k][k]}
        for method, seed, matrix in zip(table["method"], table["seed"], table["matrix"], strict=True)
        for k, name in enumerate(order(seed))
    ]
    return pd.DataFrame(rows)


def weakest(rows: "pd.DataFrame", a: str = "AWM 4", b: str = "mask") -> dict[int, float]:
    """By seed, how far `a` is above `b` on the set where it is least so over the other seeds."""
    cells = rows.pivot_table(index=["method", "seed"], columns="set", values="acc")
    gaps: Any = cells.loc[a] - cells.loc[b]  # a row a seed
    return {seed: gaps.at[seed, gaps.drop(index=seed).mean().idxmin()] for seed in gaps.index}


def knee(rows: "pd.DataFrame") -> dict[int, float]:
    """By seed, what accuracy loses from factor 4 to 8 beyond what it loses from 2 to 4."""
    acc: Any = rows.pivot_table(index="seed", columns="method", values="acc")
    return dict(2 * acc["AWM 4"] - acc["AWM 2"] - acc["AWM 8"])


def table(profile: str = "fast") -> Comparison:
    """The accuracy table: AWM and its baselines on six scripts, with Piggyback's mask at its published rate too.

    At the paper's scale: the six image sets, ImageNet's MobileNetV2 and 30 epochs, at the learning rates of its code.
    """
    net = "ImageNet" if profile == "paper" else "mobilenet_v2"
    methods = baselines(net, 5 if profile == "paper" else RANK) | modulations(net, (4, 2))
    methods["mask, published rate"] = per_task(Mask(), 1e-4, net=net)
    if profile == "paper":
        return Comparison({"six sets": six_sets}, {"mobilenet_v2": PRETRAINED}, methods, LONG, range(3))
    methods |= {"AWM 4, two rates": gains(*CHOSEN["pairs"]["AWM"]), "mask, two rates": masks(*CHOSEN["pairs"]["mask"])}
    return Comparison(STREAMS, NETS, methods, TRAINING, range(3))


def forgetting() -> Comparison:
    """What is left of each script while others are learned: AWM, and one network that goes on.

    EWC and LwF twice: with BatchNorm's statistics going on, and frozen, as in the paper's code.
    """
    methods = modulations("mobilenet_v2", (4,))
    methods |= {"fine-tuning": sequential(Learner()), "EWC": sequential(EWC(STRENGTHS["EWC"], samples=200))}
    methods["LwF"] = sequential(LwF(STRENGTHS["LwF"]))
    methods["EWC, frozen"] = sequential(EWC(STRENGTHS["EWC, frozen"], samples=200), frozen=True)
    methods["LwF, frozen"] = sequential(LwF(STRENGTHS["LwF, frozen"]), frozen=True)
    streams = {"latin and six scripts": partial(scripts_of, names=("latin", *SCRIPTS))}
    return Comparison(streams, NETS, methods, TRAINING, range(3))


def factors() -> Comparison:
    """Accuracy over the number of modulation parameters, and over bytes: half precision, bytes, and masks beside it."""
    net, made = "mobilenet_v2", modulations("mobilenet_v2", FACTORS)
    made["AWM 4, float16"] = per_task(Modulation(4, 4, store="float16"), RATES["AWM"], net=net)
    made["AWM 2x4, int8"] = per_task(Modulation(2, 4, store="int8"), RATES["AWM"], net=net)
    made |= {"mask": baselines()["mask"], "mask, two rates": masks(*CHOSEN["pairs"]["mask"])}
    return Comparison(STREAMS, NETS, made, TRAINING, range(3))


def variants() -> Comparison:
    """Other layouts, orders of the channels, interpolations, starts, and the wording of the paper's summary."""
    rules = {
        "AWM 2, reviewed": Modulation(2, 2, layout="reviewed"),
        "AWM 4, reviewed": Modulation(4, 4, layout="reviewed"),
        "AWM 2, shuffled": Modulation(2, 2, shuffle=0),
        "AWM 4, shuffled": Modulation(4, 4, shuffle=0),
        "AWM 4, nearest": Modulation(4, 4, interpolation="nearest"),
        "AWM 4, kaiming": Modulation(4, 4, init="kaiming"),
        "grid 4": Modulation(4, 4, mode="grid"),
        "grid 16": Modulation(16, 16, mode="grid"),
    }
    methods = {name: per_task(rule, RATES["AWM"]) for name, rule in rules.items()}
    return Comparison(STREAMS, NETS, modulations("mobilenet_v2", (2, 4)) | methods, TRAINING, range(3))


def which_part() -> Comparison:
    """What does the work: head and statistics alone, gains on pointwise or on depthwise convolutions alone, on all."""
    convolutions = {f"{n}.weight": m for n, m in untrained().named_modules() if isinstance(m, nn.Conv2d)}
    depthwise = tuple(n for n, m in convolutions.items() if m.groups > 1)
    pointwise = tuple(n for n, m in convolutions.items() if m.kernel_size == (1, 1))
    methods = {n: baselines()[n] for n in ("classifier, statistics frozen", "classifier", "norms")}
    for name, layers in {"depthwise": depthwise, "pointwise": pointwise}.items():
        methods[f"AWM 4, {name} alone"] = per_task(Modulation(4, 4), RATES["AWM"], layers=layers)
    methods["AWM 4, statistics frozen"] = per_task(Modulation(4, 4), RATES["AWM"], statistics="frozen")
    methods |= modulations("mobilenet_v2", (4,))
    return Comparison(STREAMS, NETS, methods, TRAINING, range(3))


def architectures() -> Comparison:
    """AWM and its baselines on a residual network and a vision transformer, at the rates chosen for MobileNetV2."""
    methods: dict[str, Method] = {}
    for net, rank in RANKS.items():
        made = baselines(net, rank) | modulations(net, (4,))
        del made["classifier, statistics frozen"]
        methods |= {f"{net}: {name}": method for name, method in made.items()}
    return Comparison(STREAMS, {"its own": backbone}, methods, TRAINING, range(2))


def places() -> dict[str, tuple[str, str]]:
    """The network and the way of adapting it behind the name of every method of `table` and `architectures`."""
    ways = {name: name for name in (*baselines(), *modulations("mobilenet_v2", (4, 2)))}
    found = {name: ("mobilenet_v2", "low rank" if name == f"low rank {RANK}" else way) for name, way in ways.items()}
    for net, rank in RANKS.items():
        found |= {f"{net}: {name}": (net, way) for name, (_, way) in found.items() if name in ways}
        found[f"{net}: low rank {rank}"] = net, "low rank"
    return found


def small(methods: Mapping[str, Method], seeds: Sequence[int], **changes: Any) -> Comparison:
    """Methods on six scripts and MobileNetV2: the setting of the smaller studies."""
    return replace(Comparison(STREAMS, NETS, methods, TRAINING, seeds), **changes)


def _rates(net: str) -> Mapping[str, float]:
    return RATES | CHOSEN[{"ImageNet": "paper_lr", "lite0": "real_lr", "drawn": "drawn_lr"}.get(net, "lr")]


def sequential(learner: Learner, frozen: bool = False) -> Method:
    """A learner on one network for all tasks, with a head for each; BatchNorm keeps to the backbone's if `frozen`."""
    whole = partial(modulated, model=partial(backbone, name="mobilenet_v2"), rule=Own(), statistics="frozen")
    training = replace(TRAINING, lr=RATES["sequential"], labels="task")
    return Method(learner, None, training, whole if frozen else None)


def scripts_of(seed: int, names: Sequence[str] = SCRIPTS, part: Any = "test", scenario: Disjoint = "task") -> Stream:
    """`scripts` for a grid: the seed changes the order of training and the heads, not the data."""
    return scripts(names, part, scenario)


def six_sets(seed: int) -> Stream:
    """The paper's image sets for a grid."""
    return pictures()


def forty(seed: int, backwards: bool = False) -> Stream:
    """`characters` for a grid, in their order or the last task first."""
    stream = characters(40)
    tasks = stream.tasks[::-1] if backwards else stream.tasks
    return replace(stream, tasks=tuple(replace(task, index=i) for i, task in enumerate(tasks)))


def costs(grid: Comparison) -> "pd.DataFrame":
    """What a task of each method stores: numbers trained and bytes, without and with a head of twenty classes.

    Nothing is trained or downloaded for it.
    """
    import pandas as pd
    from torchvision.models import mobilenet_v2

    rows = []
    for name, method in grid.methods.items():
        if not isinstance(method.learner, PerTask) or method.model is None:
            continue
        options = dict(cast(partial, method.model).keywords)
        made = options.pop("model")
        net = Modulated(mobilenet_v2() if made is PRETRAINED else untrained(made.keywords["name"]), **options)
        counts = net.parameters_per_task(CLASSES)
        head = 4 * counts["head"]
        row = {"method": name, "gains": counts["gains"], "affine": counts["affine"], "statistics": counts["statistics"]}
        stored = net.bytes_per_task(CLASSES)
        rows.append(row | {"bytes": stored - head, "bytes with head": stored})
    return pd.DataFrame(rows)


STREAMS: Mapping[str, Any] = {"six scripts": scripts_of}
NETS: Mapping[str, Any] = {"mobilenet_v2": backbone}


def _latin() -> Normalize:
    return latin()[0].normalize

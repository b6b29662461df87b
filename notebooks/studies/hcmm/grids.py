"""HCMM's experiments as grids of runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from clkit.consolidation import HCMM, Consolidation, Merging
from clkit.experiments import Comparison, Method
from clkit.learners import EWC, Joint, Learner, LwF
from clkit.training import Training
from studies.hcmm.settings import known, model

TRAINING = Training(
    epochs=5, batch=64, lr=1e-3, optimizer="adamw", schedule="cosine", warmup=0.1, clip=1.0, labels="task"
)
PAPER = replace(TRAINING, epochs=10, batch=128, lr=1e-5, weight_decay=0.1)
"""The paper's training, but for a warm-up of 500 steps, which is longer than most of its tasks."""

MODES = {"ordinary": False, "tangent": True}
LINEAR = HCMM(importance="none", correction="none")
IMPORTANCE = HCMM(correction="none")
RELEASED = HCMM(alpha=0.4, importance="raw", correction_lr=1e-7)
TUNING_SEEDS = (100, 101)
CORRECTION = {"correction": "ridge", "ridge": 100.0}
CHOSEN: dict[str, dict[str, tuple[float, float]]] = {
    "glyphs": {
        "ordinary": (1e-3, 0.0), "ordinary + linear": (1e-3, 0.5), "ordinary + importance": (1e-3, 0.5),
        "tangent": (3e-4, 0.0), "tangent + linear": (1e-3, 0.35), "tangent + importance": (1e-3, 0.2),
        "EWC": (1e-3, 10.0), "LwF": (3e-4, 0.3),
        "average, sequential": (1e-3, 0.0), "average, independent": (1e-3, 0.0),
        "MagMax, sequential": (1e-3, 0.5), "MagMax, independent": (1e-3, 0.5),
        "TIES, sequential": (1e-3, 0.5), "TIES, independent": (1e-3, 0.5),
    },
    "fonts": {
        "ordinary": (3e-3, 0.0), "ordinary + linear": (3e-3, 0.5), "ordinary + importance": (3e-3, 0.5),
        "tangent": (1e-3, 0.0), "tangent + linear": (3e-3, 0.5), "tangent + importance": (3e-3, 0.5),
        "EWC": (3e-3, 100.0), "LwF": (3e-3, 1.0),
        "average, sequential": (3e-3, 0.0), "average, independent": (3e-3, 0.0),
        "MagMax, sequential": (3e-3, 1.0), "MagMax, independent": (3e-3, 1.0),
        "TIES, sequential": (3e-3, 1.0), "TIES, independent": (3e-3, 1.0),
    },
}  # fmt: skip
"""The learning rate, and alpha, the strength or the scale, with the highest accuracy in `tuning`; other settings take
those of the glyphs."""


def method(
    consolidation: Consolidation | None = None,
    learner: Learner | None = None,
    *,
    setting: str = "glyphs",
    mode: str = "ordinary",
    lr: float = 1e-3,
    training: Training = TRAINING,
) -> Method:
    """A row of a grid: fine-tuning, "ordinary" or in the "tangent" space, of a setting's network at a learning rate."""
    made = partial(model, setting=setting, linearized=MODES[mode])
    return Method(learner or Learner(), consolidation, replace(training, lr=lr), made)


def grid(methods: Mapping[str, Method], seeds: Sequence[int], setting: str = "glyphs", **options: object) -> Comparison:
    """Methods on the stream of a setting; `options` are the stream's."""
    source = partial(known(setting).stream, **options)
    return Comparison({setting: source}, {"zero-shot": partial(model, setting=setting)}, methods, TRAINING, seeds)


def stages(setting: str = "glyphs") -> dict[str, Method]:
    """Every combination of the three stages: fine-tuning "ordinary" or in the "tangent" space, alone or with a merge
    ("linear" or by "importance"), with or without a correction; tangent + importance + correction is HCMM.
    """
    made, best = {}, CHOSEN.get(setting, CHOSEN["glyphs"])
    for mode in MODES:
        lr, _ = best[mode]
        made[mode] = method(setting=setting, mode=mode, lr=lr)
        for name, merge in (("linear", LINEAR), ("importance", IMPORTANCE)):
            lr, alpha = best[f"{mode} + {name}"]
            for end, correction in (("", {}), (" + correction", CORRECTION)):
                rule = replace(merge, alpha=alpha, **correction)
                made[f"{mode} + {name}{end}"] = method(rule, setting=setting, mode=mode, lr=lr)
    return made


def baselines(setting: str = "glyphs") -> dict[str, Method]:
    """What HCMM is compared with: regularised fine-tuning, and merges of the weights after every task."""
    row, made, best = partial(method, setting=setting), {}, CHOSEN.get(setting, CHOSEN["glyphs"])
    for name, learner in (("EWC", EWC), ("LwF", LwF)):
        lr, strength = best[name]
        made[name] = row(None, learner(strength), lr=lr)
    for kind in ("sequential", "independent"):
        for name in ("average", "MagMax", "TIES"):
            lr, scale = best[f"{name}, {kind}"]
            options = {"scale": scale} if scale else {}
            made[f"{name}, {kind}"] = row(Merging(name.lower(), options, kind), lr=lr)
    return made


def table(setting: str = "glyphs", seeds: Sequence[int] = range(5)) -> Comparison:
    """All combinations of the stages, and the baselines."""
    return grid(stages(setting) | baselines(setting), seeds, setting)


def joint(setting: str = "glyphs", seeds: Sequence[int] = range(5)) -> Comparison:
    """All data at once: the glyphs as one task; of the fonts, those seen so far."""
    training = replace(TRAINING, labels="all")
    made = {"joint": method(None, Joint(), setting=setting, lr=3e-3, training=training)}
    return grid(made, seeds, setting, **({} if setting == "fonts" else {"tasks": 1}))


def corrections(seeds: Sequence[int] = range(5)) -> Comparison:
    """The correction as the released code has it, and such as do something, on HCMM's other settings.

    "steps" are ten full-batch steps of Adam at a rate, "ridge" a closed form; "both" has both parents as the target.
    """
    lr, alpha = CHOSEN["glyphs"]["tangent + importance"]
    rules = {
        "none": {"correction": "none"},
        "steps, 1e-7 (released)": {"correction": "steps", "correction_lr": 1e-7},
        "steps, 1e-5": {"correction": "steps", "correction_lr": 1e-5},
        "steps, 1e-4": {"correction": "steps", "correction_lr": 1e-4},
        "steps, 1e-4, cosine": {"correction": "steps", "correction_lr": 1e-4, "loss": "cosine"},
    }
    rules |= {f"ridge {s:g}": {"correction": "ridge", "ridge": s} for s in (1000.0, 100.0, 10.0, 1.0)}
    rules |= {f"ridge {s:g}, both": {"correction": "ridge", "ridge": s, "target": "both"} for s in (10.0, 1.0)}
    made = {name: method(HCMM(alpha=alpha, **rule), mode="tangent", lr=lr) for name, rule in rules.items()}
    return grid(made, seeds)


def alphas(seeds: Sequence[int] = range(3)) -> Comparison:
    """Accuracy over alpha: both merges, both ways to fine-tune, and importances added up instead of averaged."""
    rules = {"linear": LINEAR, "importance": IMPORTANCE, "importance, sum": replace(IMPORTANCE, accumulate="sum")}
    made = {
        f"{mode} + {name} α={alpha:g}": method(
            replace(rule, alpha=alpha), mode=mode, lr=CHOSEN["glyphs"][f"{mode} + linear"][0]
        )
        for mode in MODES
        for name, rule in rules.items()
        for alpha in (0.1, 0.3, 0.5, 0.7, 0.9)
        if mode == "tangent" or name != "importance, sum"
    }
    return grid(made, seeds)


def rates(seeds: Sequence[int] = range(3)) -> Comparison:
    """Accuracy over the learning rate: with and without a merge, in both spaces."""
    merges = {"": None, " + importance": replace(IMPORTANCE, alpha=CHOSEN["glyphs"]["tangent + importance"][1])}
    made = {
        f"{mode}{name} lr={lr:g}": method(rule, mode=mode, lr=lr)
        for mode in MODES
        for name, rule in merges.items()
        for lr in (3e-4, 1e-3, 3e-3, 1e-2)
    }
    return grid(made, seeds)


def importances(seeds: Sequence[int] = range(5)) -> Comparison:
    """Every importance and both ways to carry it on the fonts, whose tasks have 40, 20, 10 and 5 images a class.

    The exact Fisher information, a backward pass for each of sixty classes, takes ten times as long as all the rest and
    is carried in one way alone.
    """
    lr, alpha = CHOSEN["glyphs"]["tangent + importance"]
    made = {"linear": method(replace(LINEAR, alpha=alpha), setting="fonts", mode="tangent", lr=lr)}
    for kind in ("raw", "corrected", "normalised", "fisher"):
        for carry in ("ema", "sum") if kind != "fisher" else ("ema",):
            rule = replace(IMPORTANCE, alpha=alpha, importance=kind, accumulate=carry)
            made[f"{kind}, {carry}"] = method(rule, setting="fonts", mode="tangent", lr=lr)
    return grid(made, seeds, "fonts")


SHORT = ("ordinary", "ordinary + linear", "ordinary + importance", "tangent", "tangent + importance",
         "tangent + importance + correction", "MagMax, sequential", "average, sequential")  # fmt: skip


def lengths(tasks: int, seeds: Sequence[int] = range(3)) -> Comparison:
    """The same hundred characters in another number of tasks."""
    made = stages() | baselines()
    return grid({name: made[name] for name in SHORT}, seeds, tasks=tasks)


def packs(setting: str, seeds: Sequence[int] = range(2)) -> Comparison:
    """Real images, "cifar100", "pacs" or "mnist, usps", with the settings that were chosen on the glyphs."""
    made = stages(setting) | baselines(setting)
    return grid({name: made[name] for name in (*SHORT, "EWC", "LwF")}, seeds, setting)


def paper(seeds: Sequence[int] = range(3)) -> Comparison:
    """CLIP's ViT-B/16 on CIFAR-100 in ten tasks: the stages with the released settings, and two baselines."""
    row = partial(method, setting="cifar100, CLIP", training=PAPER, lr=PAPER.lr)
    made = {mode: row(mode=mode) for mode in MODES}
    made |= {f"{mode} + importance": row(replace(RELEASED, correction="none"), mode=mode) for mode in MODES}
    made |= {"tangent + linear": row(replace(LINEAR, alpha=RELEASED.alpha), mode="tangent")}
    made |= {"tangent + importance + correction": row(RELEASED, mode="tangent")}
    made |= {"MagMax, sequential": row(Merging("magmax", {"scale": 0.5})), "average, sequential": row(Merging())}
    return grid(made, seeds, "cifar100, CLIP")


def tuning(setting: str = "glyphs") -> Comparison:
    """Learning rate, alpha and strengths, on seeds that no other grid has: other images, classes, orders, networks."""
    row, made = partial(method, setting=setting), {}
    rates = (1e-3, 3e-3) if setting == "fonts" else (3e-4, 1e-3)
    for mode in MODES:
        for lr in rates:
            made[f"{mode} lr={lr:g}"] = row(mode=mode, lr=lr)
            for alpha in (0.2, 0.35, 0.5):
                for name, merge in (("linear", LINEAR), ("importance", IMPORTANCE)):
                    chosen = replace(merge, alpha=alpha)
                    made[f"{mode} + {name} lr={lr:g} α={alpha:g}"] = row(chosen, mode=mode, lr=lr)
    for lr in rates:
        made |= {f"EWC lr={lr:g} λ={s:g}": row(None, EWC(s), lr=lr) for s in (10.0, 1e2, 1e3)}
        made |= {f"LwF lr={lr:g} λ={s:g}": row(None, LwF(s), lr=lr) for s in (0.3, 1.0, 3.0)}
        for kind in ("sequential", "independent"):
            made[f"average, {kind} lr={lr:g}"] = row(Merging("average", training=kind), lr=lr)
            for scale in (0.5, 1.0):
                made[f"MagMax, {kind} lr={lr:g} s={scale:g}"] = row(Merging("magmax", {"scale": scale}, kind), lr=lr)
                made[f"TIES, {kind} lr={lr:g} s={scale:g}"] = row(Merging("ties", {"scale": scale}, kind), lr=lr)
    return grid(made, TUNING_SEEDS, setting)


GRIDS: dict[str, Callable[[], Comparison]] = {
    "glyphs": table,
    "fonts": partial(table, "fonts"),
    "joint-glyphs": joint,
    "joint-fonts": partial(joint, "fonts"),
    "corrections": corrections,
    "alphas": alphas,
    "rates": rates,
    "importances": importances,
    "lengths-5": partial(lengths, 5),
    "lengths-10": partial(lengths, 10),
    "cifar100": partial(packs, "cifar100"),
    "pacs": partial(packs, "pacs"),
    "mnist-usps": partial(packs, "mnist, usps"),
}
"""Every comparison by name, but for the paper's own scale and the tuning."""

"""Anything goes through: networks, learners, consolidations and tiny streams drawn at random, and run.

What cannot work is refused in words of clkit's own. Nothing else raises, no NaN is a number, every row is offered once
an epoch, what is frozen keeps its bits, steps counted are steps taken. `CLKIT_DRAWS=2000 pytest tests/test_anything.py
--hypothesis-seed=1` draws more, and others.
"""

import copy
import os
import re
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from torch import nn

import clkit
from clkit import consolidation as C
from clkit.data import Examples, Normalize, Stream, Task
from clkit.learners import EWC, LEARNERS, LwF, OnlineEWC, Sum
from clkit.merging import MERGES
from clkit.modulation import LowRank, Mask, Modulated, Modulation, Own
from clkit.training import Training, run
from clkit.weights import equal, get_weights

DRAWS = int(os.environ.get("CLKIT_DRAWS", "40"))
HOME = str(Path(clkit.__file__).parent)
WIDTH = 6


class Net(nn.Module):
    """A body of two layers under a head, with whatever a draw asks for."""

    views = False

    def __init__(self, shape, classes, norm, dropout, tied, buffer, recurrent):
        super().__init__()
        convolved = len(shape) == 3
        self.first = nn.Conv2d(shape[0], WIDTH, 3, padding=1) if convolved else nn.Linear(shape[0], WIDTH)
        batchnorm = nn.BatchNorm2d if convolved else nn.BatchNorm1d
        kinds = {
            "none": nn.Identity,
            "batch": lambda: batchnorm(WIDTH),
            "batch without statistics": lambda: batchnorm(WIDTH, track_running_stats=False),
            "batch without affine": lambda: batchnorm(WIDTH, affine=False),
            "layer": lambda: nn.GroupNorm(1, WIDTH) if convolved else nn.LayerNorm(WIDTH),
            "group": lambda: nn.GroupNorm(2, WIDTH),
        }
        self.norm = kinds[norm]()
        self.dropout, self.always = nn.Dropout(0.2 if dropout == "plain" else 0.0), dropout == "always"
        self.second, self.third = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        if tied:
            self.third.weight = self.second.weight
        self.cell = nn.GRU(2, WIDTH, batch_first=True) if recurrent else None
        self.head = nn.Linear(WIDTH, classes)
        self.register_buffer("scale", torch.ones(WIDTH) if buffer == "finite" else None)
        mask = torch.zeros(WIDTH).index_fill(0, torch.tensor([0]), float("-inf"))
        self.register_buffer("mask", mask if buffer == "infinite" else None)

    def forward(self, x, *, gain=1.0):
        x = self.first(x)
        x = self.norm(x.view(len(x), -1).view(x.shape) if self.views else x).relu()
        x = self.dropout(x.mean((2, 3)) if x.ndim == 4 else x) * gain
        if self.always:
            x = nn.functional.dropout(x, 0.2, training=True)
        if self.scale is not None:
            x = x * self.scale
        if self.mask is not None:
            x = x * (x + self.mask).softmax(-1)
        if self.cell is not None:
            x = self.cell(x.unflatten(1, (3, 2)))[0][:, -1]
        return self.head(self.third(self.second(x).relu()).relu())


class Viewing(Net):
    """Reads what a convolution gives as it lies in memory."""

    views = True


class Moving(Net):
    """Moves and switches in its own ways."""

    def to(self, device):  # pyright: ignore
        super().to(device)

    def train(self, mode=True):  # pyright: ignore
        super().train(mode)


LATE = ("memory: in task", "inputs: ")  # what a memory holds is known when it holds it
NORMS = ["none", "batch", "batch", "batch without statistics", "batch without affine", "layer", "group"]
FREEZE = {
    "nothing": lambda net: net,
    "first": lambda net: net.first.requires_grad_(False),
    "first, evaluating": lambda net: nn.ModuleList([net.first, net.norm]).requires_grad_(False).eval(),
    "statistics": lambda net: net.norm.eval(),
    "a bias": lambda net: net.second.bias.requires_grad_(False),
    "all but the head": lambda net: [p.requires_grad_(False) for n, p in net.named_parameters() if "head" not in n],
}
WRAP = {
    "no": lambda net: net,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled within": lambda net: setattr(net, "third", torch.compile(net.third, backend="eager")) or net,
    "parallel within": lambda net: setattr(net, "first", nn.DataParallel(net.first)) or net,
}
RULES = (Modulation(2, 2), Mask(), LowRank(1), Own(), None)


@st.composite
def streams(draw) -> Stream:
    tasks, scenario = draw(st.integers(1, 3)), draw(st.sampled_from(["class", "task", "domain"]))
    image = draw(st.booleans())
    dtype = draw(st.sampled_from([torch.uint8, torch.float32, torch.float64] if image else
                                 [torch.float32, torch.float64, torch.float16, torch.int32]))  # fmt: skip
    g = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    classes = 2 if scenario == "domain" else 2 * tasks

    def examples(t: int, rows: int) -> Examples:
        y = (0 if scenario == "domain" else 2 * t) + torch.arange(rows) % 2
        x = torch.randn(rows, *((1, 4, 4) if image else (5,)), generator=g) + y.view(-1, *[1] * (3 if image else 1))
        return Examples((x * 20 + 60).clamp(0, 255).to(dtype) if not dtype.is_floating_point else x.to(dtype), y)

    def task(t: int) -> Task:
        own = (0, 1) if scenario == "domain" else (2 * t, 2 * t + 1)
        parts = examples(t, draw(st.integers(1, 12))), examples(t, draw(st.integers(1, 4)))
        return Task(t, f"task {t}", own, *parts, Normalize())

    return Stream("drawn", tuple(map(task, range(tasks))), tuple(map(str, range(classes))), scenario)


@st.composite
def networks(draw, stream: Stream) -> nn.Module:
    """Any network for a stream, in any wrapper."""
    with torch.random.fork_rng([]):
        torch.manual_seed(draw(st.integers(0, 9)))
        net = draw(st.sampled_from([Net, Viewing, Moving]))(
            stream.shape,
            len(stream.classes) + draw(st.sampled_from([0, 0, 0, 2])),
            draw(st.sampled_from(NORMS)),
            draw(st.sampled_from(["none", "none", "plain", "always"])),
            draw(st.booleans()),
            draw(st.sampled_from(["none", "finite", "infinite"])),
            draw(st.sampled_from([False, False, False, True])),
        )  # fmt: skip
    nn.Module.to(net, draw(st.sampled_from([torch.float32, torch.float32, torch.float64])))
    if draw(st.sampled_from([False, False, True])):
        net.eval()
    FREEZE[draw(st.sampled_from([*FREEZE]))](net)
    return WRAP[draw(st.sampled_from([*WRAP]))](net)


@st.composite
def rules(draw):
    name = draw(st.sampled_from([*LEARNERS, "sum"]))
    if name == "sum":
        return Sum(draw(rules()), draw(st.sampled_from([EWC(), LwF(), OnlineEWC()]))) if draw(st.booleans()) else LwF()
    more = {"fit_epochs": 2} if name == "GDumb" else {}
    kind = LEARNERS[name]
    return kind(memory=draw(st.integers(2, 9)), **more) if kind.remembers else kind()


def merges() -> list:
    made = []
    for name in MERGES:
        for training in ("sequential", "independent"):
            try:
                made.append(C.Merging(name, training=training))
            except ValueError:  # needs an option
                made.append(C.Merging(name, {"alpha": 0.5}, training=training))
    return made


CONSOLIDATIONS = {
    "none": [C.NoConsolidation()],
    "CLeWI": [
        C.CLeWI(0.3, align=align, refresh=refresh, points=points)
        for align in ("activations", "weights", None) for refresh in (True, False) for points in (0, 3)
    ] + [C.CLeWI("search", align=None), C.CLeWI(0.5, align=None, when="helps")],
    "SFA": [
        C.SFA(p, beta, refresh=refresh, untouched=untouched)
        for p in (0.25, 1.0, C.Drift(), C.Plateau(), C.Velocity(), C.Cosine()) for beta in (0.5, "equal")
        for refresh in (True, False) for untouched in ("average", "keep")
    ],
    "HCMM": [
        C.HCMM(0.4, importance=importance, correction=correction, target=target, refresh=refresh)
        for importance in ("corrected", "fisher", "none") for correction in ("steps", "ridge", "none")
        for target in ("previous", "both") for refresh in (True, False)
    ],
    "WiSE-FT": [C.WiSEFT(0.5), C.WiSEFT(0.3, old="base")],
    "merging": merges(),
    "EMA": [C.EMA(), C.EMA(None, every=2)],
}  # fmt: skip


def is_ours(error: BaseException) -> bool:
    """Whether clkit itself raises it, in its own words."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    kind = isinstance(error, ValueError | TypeError | FloatingPointError)
    return kind and last.filename.startswith(HOME) and bool(re.match(r"[\w .\[\]'()\"-]+: ", str(error)))


def frozen(net: nn.Module) -> dict[str, torch.Tensor]:
    """What may not move, written down from the flags: frozen parameters, and statistics in evaluation mode."""
    kept = {name for name, p in net.named_parameters() if not p.requires_grad}
    for name, module in net.named_modules():
        own = [*module.parameters()]
        still = not module.training if net.training else own and not any(p.requires_grad for p in own)
        kept |= {f"{name}.{b}" for b, _ in module.named_buffers(recurse=False)} if still else set()
    return {name: tensor for name, tensor in get_weights(net).items() if name in kept}


def steps(rows: int, batch: int) -> int:
    full, rest = divmod(rows, batch)
    return full + (rest > 1 or not full)


@settings(
    max_examples=DRAWS,
    derandomize="CLKIT_DRAWS" not in os.environ,
    deadline=None,
    suppress_health_check=[*HealthCheck],
    database=None,
    phases=[Phase.generate],
)
@given(st.data())
def test_anything_runs_or_is_refused_in_words(data):
    check(data)


def check(data):
    stream = data.draw(streams())
    given = data.draw(networks(stream))
    learner, name = data.draw(rules()), data.draw(st.sampled_from([*CONSOLIDATIONS]))
    rule = data.draw(st.sampled_from(CONSOLIDATIONS[name]))
    training = Training(
        epochs=data.draw(st.integers(0, 2)),
        batch=data.draw(st.integers(1, 5)),
        lr=0.01,
        optimizer="adamw" if getattr(rule, "uses_moments", False) else data.draw(st.sampled_from(["sgd", "adamw"])),
        momentum=0.9,
        weight_decay=0.01,
        labels=data.draw(st.sampled_from(["all", "seen", "task"])),
    )
    plain = clkit.modules.unwrapped(given)
    parts = LEARNERS["per task"], (isinstance(learner, Sum) and learner.first) or learner
    modulated, before = isinstance(parts[1], parts[0]), get_weights(given)
    flags, kept = [m.training for m in given.modules()], frozen(plain)
    seen: list[tuple[int, int, list[int]]] = []

    class Counting(type(learner)):
        def after_step(self, model, batch):
            super().after_step(model, batch)
            seen.append((batch.task.index, batch.epoch, batch.rows.tolist()))

    learner.__class__ = Counting

    def go():
        seen.clear()
        net = Modulated(given, data_rule, layers="all") if modulated else given
        model = (lambda stream, seed: copy.deepcopy(net)) if factory else net
        return run(stream, model, learner, rule, training, seed=3, device="cpu", progress=False)

    data_rule, factory = data.draw(st.sampled_from(RULES)) if modulated else None, data.draw(st.booleans())
    state = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = go()
    except Exception as error:
        event(f"refused: {str(error)[:60]}")
        if not is_ours(error):
            raise
        assert not seen or isinstance(error, FloatingPointError) or str(error).startswith(LATE), error
        return
    event(f"ran {name}")
    count = len(stream)
    for matrix in (result.accuracy, result.masked):
        assert matrix.shape == (count, count) and ((matrix >= 0) & (matrix <= 1)).all()
    assert np.isfinite(result.losses).all() and all(np.isfinite(part).all() for part in result.training_loss)
    for task, losses in zip(stream, result.training_loss, strict=True):
        for epoch in range(training.epochs):
            offered = [row for t, e, rows in seen if (t, e) == (task.index, epoch) for row in rows]
            assert sorted(offered) == list(range(len(task.train)))
        taken = sum(t == task.index for t, _, _ in seen)
        assert len(losses) == taken == training.epochs * steps(len(task.train), training.batch)
    if not modulated:
        for weights in (*result.trained, *result.weights, get_weights(result.model)):
            assert weights.keys() == before.keys()
            assert equal(kept, {name: weights[name] for name in kept})
    assert equal(get_weights(given), before) and [m.training for m in given.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    if data.draw(st.sampled_from([True, False, False, False])):
        again = go()
        assert np.array_equal(result.losses, again.losses)
        assert all(equal(a, b) for a, b in zip(result.weights, again.weights, strict=True))

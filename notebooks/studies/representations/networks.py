"""The networks that the studies look into, and how they are trained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from clkit import data, models, weights
from clkit.consolidation import HCMM, SFA, CLeWI, Consolidation
from clkit.data import Stream
from clkit.learners import ER, Learner
from clkit.training import Result, Training, run
from clkit.weights import Weights

SEEDS = range(5)
TASKS = 5
TRAINING = Training(6, 32, 0.1, schedule="cosine")
SETTINGS: Mapping[str, tuple[Any, Training, tuple[str, ...]]] = {
    "convnet": (models.convnet, TRAINING, ("norm1", "norm2", "norm3", "linear")),
    "perceptron": (
        partial(models.mlp, hidden=(128,) * 5),
        replace(TRAINING, epochs=12),
        ("linear1", "linear2", "linear3", "linear4", "linear5", "linear"),
    ),
}
"""The network, its training, and the layers whose units are measured before their nonlinearities."""
LAYERS = ("conv1", "relu1", "conv2", "relu2", "conv3", "relu3", "pool", "linear")
METHODS: Mapping[str, tuple[Learner, Consolidation | None]] = {
    "fine-tuning": (Learner(), None),
    "ER": (ER(memory=50), None),
    "CLeWI": (ER(memory=50), CLeWI(alpha=0.3, points=0)),
    "SFA": (ER(memory=50), SFA(p=0.25, beta=0.3, refresh=True)),
}
"""CLeWI and SFA are on top of ER, with the same memory."""
STRENGTHS: Mapping[str, Mapping[str, Any]] = {
    "none": {"correction": "none"},
    "steps, 1e-7 (released)": {"correction": "steps", "correction_lr": 1e-7},
    "ridge 100": {"correction": "ridge", "ridge": 100.0},
    "ridge 10": {"correction": "ridge", "ridge": 10.0},
    "ridge 1": {"correction": "ridge", "ridge": 1.0},
}
ENCODING = Training(10, 64, 3e-3, optimizer="adamw", schedule="cosine", warmup=0.1, weight_decay=0.01)
TUNING = Training(5, 64, 1e-3, optimizer="adamw", schedule="cosine", warmup=0.1, clip=1.0, labels="task")


@dataclass(frozen=True, eq=False)
class Pair:
    """Two networks trained on all classes at once, from initialisations of their own, and how they began.

    - `model`: of their architecture; `stream`: their data, one task
    - `a`, `b`: weights after training; `before`: of both before it
    - `x`, `y`: prepared test inputs and their labels; `inputs`: prepared training inputs
    """

    model: nn.Module
    stream: Stream
    a: Weights
    b: Weights
    before: tuple[Weights, Weights]
    x: Tensor
    y: Tensor
    inputs: Tensor


def pair(seed: int = 0, network: str = "convnet", training: Training | None = None) -> Pair:
    """Trains two networks of a seed on the ten digits at once, on the CPU."""
    factory, usual, _ = SETTINGS[network]
    stream = data.split(data.digits(), 1)
    seeds = (2 * seed, 2 * seed + 1)
    runs = [_run(stream, factory, None, None, training or usual, s) for s in seeds]
    before = [weights.get_weights(factory(stream, seed=s)) for s in seeds]
    task, (a, b) = stream[0], (r.weights[0] for r in runs)
    inputs, x = task.prepare(task.train.x[:500]), task.prepare(task.test.x)
    return Pair(runs[0].model.eval(), stream, a, b, (before[0], before[1]), x, task.test.y, inputs)


def learned(method: str, seed: int = 0, training: Training | None = None) -> Result:
    """One of `METHODS` on the ten digits in five tasks of two, in an order that the seed draws."""
    stream = data.split(data.digits(), TASKS, order=seed)
    return _run(stream, models.convnet, *METHODS[method], training or replace(TRAINING, schedule="constant"), seed)


def letters(seed: int = 0, tasks: int = 4, per_class: int = 40) -> Stream:
    """Forty-eight Greek letters at 16 x 16 pixels in tasks of equal size, in an order that the seed draws."""
    full = data.glyphs("greek", per_class=per_class, size=16, jitter=1.5, seed=seed)
    return data.split(replace(full, normalize=_latin(seed, per_class)[0].normalize), tasks, order=seed)


def encoder(stream: Stream, per_class: int = 40, training: Training = ENCODING, *, seed: int = 0) -> nn.Module:
    """An encoder trained on Latin letters, under a frozen head of the prototypes of three other images a class."""
    trained = _run(_latin(seed, per_class), models.encoder, None, None, training, seed).model
    body = trained.get_submodule("encoder").eval()
    shown = data.glyphs("greek", per_class=3, size=16, jitter=1.5, seed=seed + 10_000).train
    return models.with_prototypes(body, models.prototypes(body, stream[0].prepare(shown.x), shown.y))


def corrected(model: nn.Module, stream: Stream, strength: str, seed: int = 0, training: Training = TUNING) -> Result:
    """HCMM on a stream of letters, from a model of `encoder`, with one of `STRENGTHS` of the correction."""
    return _run(stream, model, None, HCMM(alpha=0.5, **STRENGTHS[strength]), training, seed)


def _run(stream: Stream, model: Any, learner: Any, consolidation: Any, training: Training, seed: int) -> Result:
    return run(stream, model, learner, consolidation, training, seed=seed, device="cpu", progress=False)


def _latin(seed: int, per_class: int) -> Stream:
    return data.split(data.glyphs("latin", per_class=per_class, size=16, seed=seed), 1)

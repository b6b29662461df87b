"""Streams that train in milliseconds."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clkit import alignment, models
from clkit.data import Examples, Normalize, Stream, Task
from clkit.data.core import IGNORED
from clkit.learners import PerTask
from clkit.modulation import Modulation, modulated
from clkit.training import Result, Training, run

QUICK = Training(epochs=2, batch=8, lr=0.1)


def stream(tasks: int = 3, rows: int = 21, scenario: str = "class") -> Stream:
    """Two classes a task, each a noisy point in space of its own."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(2 * tasks, 6, generator=g) * 3

    def examples(t: int, count: int) -> Examples:
        y = 2 * t + torch.arange(count) % 2
        return Examples(centres[y] + torch.randn(count, 6, generator=g), y)

    parts = tuple(
        Task(t, f"task {t}", (2 * t, 2 * t + 1), examples(t, rows), examples(t, 10), Normalize()) for t in range(tasks)
    )
    return Stream("toy", parts, tuple(map(str, range(2 * tasks))), scenario)


def images(tasks: int = 3, rows: int = 24) -> Stream:
    """Two classes a task, each a noisy picture of its own, 6x6."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 200, (2 * tasks, 1, 6, 6), generator=g)

    def examples(t: int, count: int) -> Examples:
        y = 2 * t + torch.arange(count) % 2
        noise = torch.randint(0, 55, (count, 1, 6, 6), generator=g)
        return Examples((pictures[y] + noise).to(torch.uint8), y)

    norm = Normalize((0.4,), (0.25,))
    parts = tuple(
        Task(t, f"task {t}", (2 * t, 2 * t + 1), examples(t, rows), examples(t, 10), norm) for t in range(tasks)
    )
    return Stream("pictures", parts, tuple(map(str, range(2 * tasks))))


def domains() -> Stream:
    """Two classes in three places."""
    source = stream()

    def fold(part: Examples) -> Examples:
        return Examples(part.x, part.y % 2)

    parts = (replace(t, classes=(0, 1), train=fold(t.train), test=fold(t.test)) for t in source)
    return Stream("domains", tuple(parts), ("a", "b"), "domain")


def tokens(tasks: int = 2, rows: int = 12) -> Stream:
    """Sequences of five tokens, four kinds a task; the target is the next one, and the last has none."""
    g = torch.Generator().manual_seed(0)

    def examples(t: int, count: int) -> Examples:
        x = 4 * t + torch.randint(4, (count, 5), generator=g)
        y = x.roll(-1, 1)
        y[:, -1] = IGNORED
        return Examples(x, y)

    parts = (
        Task(t, f"task {t}", tuple(range(4 * t, 4 * t + 4)), examples(t, rows), examples(t, 6)) for t in range(tasks)
    )
    return Stream("tokens", tuple(parts), tuple(map(str, range(4 * tasks))))


def small_reader(stream: Stream, *, seed: int = 0) -> torch.nn.Module:
    """Predicts the next token from the last."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers = (
            torch.nn.Embedding(len(stream.classes), 6),
            torch.nn.Linear(6, 6),
            torch.nn.Linear(6, len(stream.classes)),
        )
        return torch.nn.Sequential(*layers)


def small_convnet(stream: Stream, *, seed: int = 0) -> torch.nn.Module:
    """A convnet with BatchNorm that takes milliseconds."""
    return models.convnet(stream, widths=(4, 6, 5), seed=seed)


def derived_once() -> Callable[[torch.nn.Module, torch.Tensor], alignment.Symmetry]:
    """`alignment.symmetry`, derived once for networks that print alike and inputs of one shape."""
    derive, known = alignment.symmetry, {}

    def symmetry(model, example):
        key = str(model), example.shape
        if key not in known:
            known[key] = derive(model, example)
        return known[key]

    return symmetry


def same_tree(a, b) -> bool:
    """Whether two states are equal bit by bit, with their keys in the same order."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_tree(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return type(a) is type(b) and a == b


def quick(stream: Stream, learner=None, consolidation=None, *, model=models.mlp, training=QUICK, **more) -> Result:
    """A run on the CPU without a progress bar; the model is modulated where the learner needs that."""
    if isinstance(learner, PerTask):
        model = partial(modulated, model=model, rule=Modulation(2, 2))
    more = {"device": "cpu", "progress": False} | more
    return run(stream, model, learner, consolidation, training, **more)


class Sizes(TorchDispatchMode):
    """The most numbers that a tensor had which was made meanwhile."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.largest = max(self.largest, *(t.numel() for t in [found] if isinstance(t, torch.Tensor)), 0)
        return found

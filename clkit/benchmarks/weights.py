"""Sums of weights at memory bandwidth: against copying the same weights, and against most merging code's comprehension.

Five networks of ResNet-18's shapes, one CPU thread. Traffic is ideal: every input read once, the result written once.
A result that is allocated is written to fresh memory, which the system has to hand out first; so is that of `clone`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from clkit.benchmarks import Row, apart, interleaved, row
from clkit.merging import average, task_arithmetic
from clkit.weights import lerp

REPEATS = 9


def resnet18(seed: int) -> dict[str, Tensor]:
    """Random weights of ResNet-18's shapes for 10 classes: 11.2 million, BatchNorm's statistics included."""
    widths, shapes = [(3, 64, 7), (64, 64, 3)], {}
    for before, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        widths += [(before, width, 3), (width, width, 3), (width, width, 3), (width, width, 3)]
        widths += [(before, width, 1)] if before != width else []
    for i, (before, width, side) in enumerate(w for j, w in enumerate(widths) if j != 1):
        shapes[f"{i}.conv"] = (width, before, side, side)
        shapes |= {f"{i}.{name}": (width,) for name in ("weight", "bias", "mean", "var")}
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(s, generator=g) for name, s in (shapes | {"fc": (10, 512), "fc.bias": (10,)}).items()}


def measure() -> dict[str, float]:
    """Gigabytes a second of each way, interleaved, in this process as it stands."""
    *ws, base = (resnet18(seed) for seed in range(6))
    out = resnet18(9)
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: [out[name].copy_(t) for name, t in base.items()]),
        "clone": (2, lambda: {name: t.clone() for name, t in base.items()}),
        "lerp into place": (3, lambda: lerp(ws[0], ws[1], 0.3, out=out)),
        "lerp": (3, lambda: lerp(ws[0], ws[1], 0.3)),
        "lerp, written out": (3, lambda: {name: (1 - 0.3) * t + 0.3 * ws[1][name] for name, t in ws[0].items()}),
        "average of 5 into place": (6, lambda: average(ws, out=out)),
        "average of 5": (6, lambda: average(ws)),
        "average of 5, written out": (6, lambda: {name: sum(w[name] for w in ws) / 5 for name in ws[0]}),
        "task arithmetic of 5 into place": (7, lambda: task_arithmetic(ws, base=base, scale=0.3, out=out)),
        "task arithmetic of 5": (7, lambda: task_arithmetic(ws, base=base, scale=0.3)),
        "task arithmetic of 5, written out": (
            7,
            lambda: {name: t + 0.3 * sum(w[name] - t for w in ws) for name, t in base.items()},
        ),
    }
    for _, way in ways.values():
        way()
    size = sum(t.nbytes for t in base.values()) / 1e9
    seconds = interleaved({name: way for name, (_, way) in ways.items()}, REPEATS)
    return {name: networks * size / seconds[name] for name, (networks, _) in ways.items()}


def bench() -> list[Row]:
    """Each sum against copying into place and, where it allocates its result, against cloning and plain code."""
    rates = apart(measure)
    table = []
    for name in ("lerp", "average of 5", "task arithmetic of 5"):
        pairs = [(f"{name} into place", "copy"), (name, "copy"), (name, "clone"), (name, f"{name}, written out")]
        table += [row(f"{a} / {b}", "GB a second", rates[a], rates[b]) for a, b in pairs]
    return table

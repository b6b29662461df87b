"""Merges: sums of weights at memory bandwidth, and TIES in pieces against TIES by sorting.

Five networks of ResNet-18's shapes, one CPU thread. The traffic of sums is ideal: every input read once, the result
written once. A result that is allocated is written to fresh memory, which the system has to hand out first; so is that
of `clone`. TIES runs in processes of its own, each way in another, for its time and the most memory it needs.
"""

import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from clkit.benchmarks import Row, apart, interleaved, row
from clkit.merging import average, task_arithmetic, ties
from clkit.weights import Weights, lerp

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


def bandwidths() -> dict[str, float]:
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


def sums() -> list[Row]:
    """Each sum against copying into place and, where it allocates its result, against cloning and plain code."""
    rates = apart(bandwidths)
    table = []
    for name in ("lerp", "average of 5", "task arithmetic of 5"):
        pairs = [(f"{name} into place", "copy"), (name, "copy"), (name, "clone"), (name, f"{name}, written out")]
        table += [row(f"{a} / {b}", "GB a second", rates[a], rates[b]) for a, b in pairs]
    return table


TASKS, PROCESSES = 5, 3


def by_sorting(ws: list[dict[str, Tensor]], base: Weights, density: float = 0.2) -> dict[str, Tensor]:
    """TIES as it is mostly written: all task vectors stacked, magnitudes sorted."""
    origin = torch.cat([t.flatten() for t in base.values()])
    vectors = torch.stack([torch.cat([t.flatten() for t in w.values()]) for w in ws]) - origin
    keep = int(density * vectors.shape[1])
    vectors = vectors * (vectors.abs() >= vectors.abs().sort(1, descending=True).values[:, keep - 1 : keep])
    agree = vectors.sign() == vectors.sum(0).sign()
    merged = origin + (vectors * agree).sum(0) / (agree & (vectors != 0)).sum(0).clamp(min=1)
    parts = merged.split([t.numel() for t in base.values()])
    return {name: part.view_as(t) for part, (name, t) in zip(parts, base.items(), strict=True)}


def one_merge(way: str) -> dict[str, float]:
    """The seconds that one way takes, and the memory it needs at most, in networks."""
    *ws, base = (resnet18(seed) for seed in range(TASKS + 1))
    network = sum(t.nbytes for t in base.values())
    small = [{"w": w["fc"]} for w in (*ws, base)]  # loads the code, which would count as memory
    ties(small[:-1], base=small[-1])
    by_sorting(small[:-1], small[-1])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    ties(ws, base=base) if way == "pieces" else by_sorting(ws, base)
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / network
    return {"seconds": seconds, "networks": TASKS + 1 + grown}


def ties_by_sorting() -> list[Row]:
    """Merges a second, and networks in memory at most; medians over processes, taking turns."""
    found = [(apart(one_merge, "pieces"), apart(one_merge, "sorting")) for _ in range(PROCESSES)]
    (ours, most), (theirs, their_most) = (
        [statistics.median(results[key] for results in way) for key in ("seconds", "networks")]
        for way in zip(*found, strict=True)
    )
    return [
        row(f"TIES of {TASKS}, pieces / sorting", "merges a second", 1 / ours, 1 / theirs),
        row(f"memory of TIES of {TASKS}, pieces / sorting", "networks at most", most, their_most),
    ]


BENCHMARKS = {"weights": sums, "merging": ties_by_sorting}

"""TIES in pieces against TIES by sorting: time, and the most memory, in networks, inputs and base included.

Five networks of ResNet-18's shapes, one CPU thread, each way in processes of its own.
"""

import resource
import statistics
import time

import torch
from torch import Tensor

from clkit.benchmarks import Row, apart, row
from clkit.benchmarks.weights import resnet18
from clkit.merging import ties
from clkit.weights import Weights

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


def measure(way: str) -> dict[str, float]:
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


def bench() -> list[Row]:
    """Merges a second, and networks in memory at most; medians over processes, taking turns."""
    found = [(apart(measure, "pieces"), apart(measure, "sorting")) for _ in range(PROCESSES)]
    (ours, most), (theirs, their_most) = (
        [statistics.median(results[key] for results in way) for key in ("seconds", "networks")]
        for way in zip(*found, strict=True)
    )
    return [
        row(f"TIES of {TASKS}, pieces / sorting", "merges a second", 1 / ours, 1 / theirs),
        row(f"memory of TIES of {TASKS}, pieces / sorting", "networks at most", most, their_most),
    ]

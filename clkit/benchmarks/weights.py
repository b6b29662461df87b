"""Merging at memory bandwidth: `weights.lerp` against the dictionary comprehension of most merging code."""

import statistics
from collections.abc import Callable

import torch

from clkit.benchmarks import interleaved
from clkit.weights import lerp

REPEATS = 15


def bench() -> list[dict[str, object]]:
    """Two networks the size of ResNet-18 interpolated at one position; gigabytes a second, medians, interleaved."""
    g = torch.Generator().manual_seed(0)
    shapes = [(512, 512, 3, 3)] * 4 + [(256, 256, 3, 3)] * 3 + [(64,)] * 40
    a, b = ({str(i): torch.randn(shape, generator=g) for i, shape in enumerate(shapes)} for _ in range(2))
    out = {name: torch.empty_like(tensor) for name, tensor in a.items()}
    ways: dict[str, Callable[[], object]] = {
        "lerp into place": lambda: lerp(a, b, 0.3, out=out),
        "lerp": lambda: lerp(a, b, 0.3),
        "(1 - t) a + t b": lambda: {name: (1 - 0.3) * a[name] + 0.3 * b[name] for name in a},
    }
    seconds = interleaved(ways, REPEATS)
    moved = 3 * sum(tensor.nbytes for tensor in a.values()) / 1e9
    rates = {name: moved / statistics.median(values) for name, values in seconds.items()}
    naive = rates.pop("(1 - t) a + t b")
    return [
        {"name": f"{name} / (1 - t) a + t b", "unit": "GB a second", "ours": r, "theirs": naive, "ratio": r / naive}
        for name, r in rates.items()
    ]

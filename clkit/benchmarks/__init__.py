"""Each claim about speed, measured against the naive way in one run: `bench()` of every module gives rows of ratios."""

import time
from collections.abc import Callable, Mapping


def interleaved(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """The seconds that each way takes, `repeats` times, the ways taking turns: a slow minute slows them all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds

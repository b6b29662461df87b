"""Each claim about speed, measured against the naive way in one run: every benchmark gives rows of ratios."""

import importlib
import inspect
import json
import os
import pkgutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from clkit import checks

Row = dict[str, object]


def benchmarks() -> dict[str, Callable[[], list[Row]]]:
    """The benchmarks by name: what the modules of this folder have in BENCHMARKS."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {name: function for module in modules for name, function in module.BENCHMARKS.items()}


def rows(names: Sequence[str] = (), progress: bool = True) -> Iterator[Row]:
    """Runs benchmarks, by default all, one after another, and yields their rows: name, unit, ours, theirs, ratio.

    Raises ValueError on an unknown name before any is run.
    """
    from tqdm.auto import tqdm

    known = benchmarks()
    for name in names:
        checks.choice("benchmark", name, known)
    for name in tqdm(names or list(known), disable=not progress, unit="benchmark"):
        yield from known[name]()


def interleaved(
    ways: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median seconds by `clock` that each way takes, of `repeats`, taking turns: a slow minute slows them all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = clock()
            way()
            seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def apart(measure: Callable[..., Any], *arguments: str) -> Any:
    """What a module's function gives, a JSON value, called with texts in a new process of one thread and no GPU."""
    code = f"import json, sys; from {inspect.getmodule(measure).__name__} import {measure.__name__} as f; "  # type: ignore[union-attr]
    command = [sys.executable, "-c", code + "print(json.dumps(f(*sys.argv[1:])))", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{measure.__module__}.{measure.__name__} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def row(name: str, unit: str, ours: float, theirs: float) -> Row:
    """A row of the table: two numbers of one unit, and ours over theirs."""
    return {"name": name, "unit": unit, "ours": ours, "theirs": theirs, "ratio": ours / theirs}

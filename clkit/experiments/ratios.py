"""The benchmarks: every function of `clkit.benchmarks` whose name begins with `bench`."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from clkit.data.core import unknown


def benchmarks() -> dict[str, Callable[[], Any]]:
    """The benchmarks by name: the module's where it has one, else module.function."""
    package = importlib.import_module("clkit.benchmarks")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        functions = [
            (name, function)
            for name, function in inspect.getmembers(module, inspect.isfunction)
            if name.startswith("bench") and function.__module__ == module.__name__
        ]
        for name, function in functions:
            found[info.name if len(functions) == 1 else f"{info.name}.{name}"] = function
    return found


def bench(names: Sequence[str] = (), progress: bool = True) -> Iterator[dict[str, Any]]:
    """Runs benchmarks, by default all, one after another, and yields the rows of each: name, ours, theirs, ratio."""
    from tqdm.auto import tqdm

    known = benchmarks()
    for name in names:
        if name not in known:
            raise unknown("benchmark", name, known)
    for name in tqdm(names or list(known), disable=not progress, unit="benchmark"):
        rows = known[name]()
        yield from [dict(rows)] if isinstance(rows, Mapping) else rows

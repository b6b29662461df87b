"""What claims are about: a measure of runs, and effects, from tables of runs to a number for each seed."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from clkit.training import Result


def in_the_end(result: Result) -> dict[str, Any]:
    """Test accuracy on each task after the last one, among all classes and `masked` to the task's own."""
    return {"accuracy": result.accuracy[-1].tolist(), "masked": result.masked[-1].tolist()}


def mean_gain(rows: pd.DataFrame, names: Sequence[str], base: str) -> pd.Series:
    """How much the methods of these names gain over `base`, on average over them."""
    acc = rows.pivot(index="seed", columns="method", values="acc")
    return acc[list(names)].mean(axis=1) - acc[base]


def lead(a: str, b: str, measure: Callable[..., Any], **options: Any) -> Callable[[pd.DataFrame], pd.Series]:
    """How much higher a measure's column `a` is than its column `b`, by seed, of any table; `options` are its own."""

    def gap(rows: pd.DataFrame) -> pd.Series:
        found = measure(rows, **options)
        return found[a] - found[b]

    return gap

"""Means, spreads and paired differences over the rows of a table of runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

AXES = ("stream", "model", "training", "method", "seed")


class Difference(NamedTuple):
    """The mean of `n` paired differences and the ends of its confidence interval."""

    mean: float
    lower: float
    upper: float
    n: int


def summarise(table: "pd.DataFrame", by: str | Sequence[str] = "method", value: str = "acc") -> "pd.DataFrame":
    """The mean, the standard deviation (n - 1 in the denominator, NaN for one row) and the number of rows by group.

    Groups come in the order of the table.
    """
    by = [by] if isinstance(by, str) else list(by)
    _check_columns(table, *by, value)
    named = {"mean": (value, "mean"), "std": (value, "std"), "n": (value, "count")}
    return table.groupby(by, sort=False, as_index=False).agg(**named)


def paired_difference(
    table: "pd.DataFrame",
    a: str,
    b: str,
    value: str = "acc",
    *,
    column: str = "method",
    by: Sequence[str] | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Difference:
    """How much higher `value` is where `column` is `a` than where it is `b`, with a bootstrap confidence interval.

    Rows are paired where they agree `by` these columns, by default in every other axis of the table: stream, model,
    training and seed. Every row of either needs its partner. The interval is the percentile bootstrap over pairs
    (Efron 1979), drawn from a generator of its own; it is NaN for one pair and, with fewer than about ten, narrower
    than its level says. Swapping `a` and `b` mirrors everything.
    """
    by = [axis for axis in AXES if axis in table and axis != column] if by is None else list(by)
    _check_columns(table, column, *by, value)
    if not 0 < level < 1:
        raise ValueError(f"level: {level!r}; give a share in (0, 1), for example 0.95")
    first, second = (_by_place(table, column, name, by, value) for name in (a, b))
    alone = sorted(map(str, first.keys() ^ second.keys()))
    if alone:
        raise ValueError(f"{a!r} and {b!r} are not paired at {by} = {', '.join(alone[:3])}; run both there")
    gaps = np.array([number - second[place] for place, number in first.items()])
    n = len(gaps)
    if n == 1:
        return Difference(float(gaps[0]), float("nan"), float("nan"), 1)
    picks = np.random.default_rng(seed).integers(n, size=(draws, n))
    lower, upper = np.quantile(gaps[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(gaps.mean()), float(lower), float(upper), n)


def _by_place(table: "pd.DataFrame", column: str, name: str, by: list[str], value: str) -> dict[tuple, float]:
    """The values of the rows where `column` is `name`, by what the columns `by` hold."""
    found: dict[tuple, float] = {}
    for label, number, *place in zip(table[column], table[value], *(table[axis] for axis in by), strict=True):
        if label == name and tuple(place) in found:
            raise ValueError(f"by: {name!r} has several rows at {by} = {place}; name more columns to pair by")
        if label == name:
            found[tuple(place)] = float(number)
    if not found:
        raise KeyError(f"{name!r} is not in column {column!r}; it holds {', '.join(dict.fromkeys(table[column]))}")
    return found


def _check_columns(table: "pd.DataFrame", *columns: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise KeyError(f"columns {missing} are not in the table; it has {', '.join(map(str, table.columns))}")

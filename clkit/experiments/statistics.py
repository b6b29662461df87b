"""Means, spreads and paired differences over rows of a table of runs, with Student's intervals, and verdicts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from clkit import checks

Verdict = Literal["holds", "does not hold", "open"]
AXES = ("stream", "model", "training", "method", "seed")


class Difference(NamedTuple):
    """The mean of `n` paired differences and the ends of its confidence interval."""

    mean: float
    lower: float
    upper: float
    n: int

    @property
    def verdict(self) -> Literal["gains", "loses", "open"]:
        """On which side of 0 the interval lies: "gains" above, "loses" below, "open" with 0 inside or no interval."""
        return "gains" if self.lower > 0 else "loses" if self.upper < 0 else "open"


def difference(gaps: ArrayLike, level: float = 0.95) -> Difference:
    """The mean of paired gaps, one number a pair, with the ends of Student's paired t interval at `level`.

    Mean ± t s / sqrt(n), t the quantile with n - 1 degrees of freedom (Student 1908). It is right for independent gaps
    from one normal distribution, and close for many from any; it says how sure the mean is over further pairs like
    these (seeds, say), not over other streams or networks. Its ends are NaN for one pair, and where a gap is. Raises
    ValueError for no gaps, for an array that is not flat, and for a level outside (0, 1).
    """
    values = np.asarray(gaps, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"gaps: an array of shape {values.shape}; give one number for each pair, at least one pair")
    if not 0 < level < 1:
        raise ValueError(f"level: {level!r}; give a share in (0, 1), for example 0.95")
    from scipy import stats

    mean, n, lower, upper = values.mean(), len(values), float("nan"), float("nan")
    if n > 1:
        lower, upper = mean + stats.sem(values) * np.array(stats.t.interval(level, n - 1))
    return Difference(float(mean), float(lower), float(upper), n)


def p_value(gaps: ArrayLike, low: float = 0.0, high: float = np.inf) -> float:
    """The two-sided p of Student's paired t test of the mean gap against `low` or `high`, whichever is nearer to it.

    NaN where nothing can be tested: for fewer than two gaps, and for gaps that are all the same. These have no spread
    to compare their mean with, and come from a floor or a ceiling, or from what the seed does not move.
    """
    from scipy import stats

    values = np.asarray(gaps, dtype=float)
    if len(values) < 2 or np.ptp(values) <= 1e-9 * abs(values).max():
        return float("nan")
    distance = min(abs(values.mean() - end) for end in (low, high) if np.isfinite(end))
    error = values.std(ddof=1) / len(values) ** 0.5
    return float(2 * stats.t.sf(distance / error, len(values) - 1))


def holm(p: ArrayLike) -> np.ndarray:
    """p values corrected for being several (Holm 1979): the smallest of m times m, the next times m - 1, and so on.

    None comes out lower than a smaller one, or above 1. NaN, what was not tested, stays and does not count.
    """
    found = np.array(p, dtype=float)
    order = np.argsort(found, kind="stable")[: np.isfinite(found).sum()]
    found[order] = np.minimum(1, np.maximum.accumulate(found[order] * np.arange(len(order), 0, -1)))
    return found


def verdict(mean: float, p: float, low: float = 0.0, high: float = np.inf, level: float = 0.05) -> Verdict:
    """Whether a mean effect lies between `low` and `high`: "open" unless p, against the nearer, is below `level`."""
    return "open" if not p < level else "holds" if low < mean < high else "does not hold"


@checks.arguments
def summarise(
    table: pd.DataFrame, by: str | Sequence[str] = "method", value: str = "acc", level: float = 0.95
) -> pd.DataFrame:
    """The mean of `value` by group, the ends of its Student's interval, the standard deviation and the number of rows.

    Columns: those of `by`, mean, lower, upper, std (n - 1 in the denominator), n. Rows should be independent, seeds for
    example; of the interval see `difference`. It and std are NaN for one row. Rows without a value do not count. Groups
    come in the order of the table.
    """

    by = [by] if isinstance(by, str) else list(by)
    if not by:
        raise ValueError("by: (); give a column at least")
    _check_columns(table, *by, value)
    rows, groups = [], cast(Any, table.groupby(by, sort=False, dropna=False)[value])
    for place, part in groups:
        numbers = part.dropna()
        mean, lower, upper, _ = difference(numbers if len(numbers) else [np.nan], level)
        rows.append((*place, mean, lower, upper, numbers.std(), len(numbers)))
    return pd.DataFrame(rows, columns=[*by, "mean", "lower", "upper", "std", "n"])


@checks.arguments
def paired_difference(
    table: pd.DataFrame,
    a: str,
    b: str,
    value: str = "acc",
    *,
    column: str = "method",
    by: Sequence[str] | None = None,
    level: float = 0.95,
) -> Difference:
    """How much higher `value` is where `column` is `a` than where it is `b`, with Student's paired t interval.

    Rows are paired where they agree `by` these columns, by default in every other axis of the table: stream, model,
    training and seed. Every row of either needs its partner, else ValueError; and for what is not in the table.
    Of the interval, and of what it assumes of the pairs, see `difference`. Swapping `a` and `b` mirrors everything.
    """
    by = [axis for axis in AXES if axis in table and axis != column] if by is None else list(by)
    _check_columns(table, column, *by, value)
    first, second = (_by_place(table, column, name, by, value) for name in (a, b))
    alone = sorted(map(str, first.keys() ^ second.keys()))
    if alone:
        raise ValueError(f"{a!r} and {b!r} are not paired at {by} = {', '.join(alone[:3])}; run both there")
    return difference([number - second[place] for place, number in first.items()], level)


def contrasts(
    table: pd.DataFrame,
    pairs: Mapping[str, tuple[str, str]] | Iterable[tuple[str, str]],
    value: str = "acc",
    *,
    column: str = "method",
    within: str | Sequence[str] = (),
    by: Sequence[str] | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """What one method adds over another, paired by seed: a row for each pair (a, b) with the columns of `Difference`.

    ```python
    gains = contrasts(table, {"ER": ("ER + CLeWI", "ER"), "MIR": ("MIR + CLeWI", "MIR")})
    gains.verdict["ER"], contrasts(table, [("ER + CLeWI", "ER")]).loc["ER + CLeWI", "ER"]
    ```

    Columns: mean (of a's `value` less b's), lower, upper, n, verdict ("gains", "loses", "open"). The index has the
    names of the pairs, or else a and b; before them, what the columns `within` hold: the pairs are then compared for
    each of their groups. Other arguments and errors are those of `paired_difference`.
    """

    named = {(name,): pair for name, pair in pairs.items()} if isinstance(pairs, Mapping) else {(*p,): p for p in pairs}
    within = [within] if isinstance(within, str) else list(within)
    groups: Any = table.groupby(within, sort=False, dropna=False) if within else [((), table)]
    rows = {}
    for place, part in groups:
        for name, (a, b) in named.items():
            found = paired_difference(part, a, b, value, column=column, by=by, level=level)
            rows[(*place, *name)] = (*found, found.verdict)
    own = ["pair"] if isinstance(pairs, Mapping) else ["a", "b"]
    index = pd.MultiIndex.from_tuples(rows, names=[*within, *own])
    columns = [*Difference._fields, "verdict"]
    return pd.DataFrame(rows.values(), index if index.nlevels > 1 else index.get_level_values(0), columns)


def _by_place(table: pd.DataFrame, column: str, name: str, by: list[str], value: str) -> dict[tuple, float]:
    """The values of the rows where `column` is `name`, by what the columns `by` hold."""
    found: dict[tuple, float] = {}
    for label, number, *place in zip(table[column], table[value], *(table[axis] for axis in by), strict=True):
        if label == name and tuple(place) in found:
            raise ValueError(f"by: {name!r} has several rows at {by} = {place}; name more columns to pair by")
        if label == name:
            found[tuple(place)] = float(number)
    if not found:
        held = ", ".join(map(str, dict.fromkeys(table[column])))
        raise ValueError(f"{column}: {name!r} is not in this column; it holds {held}")
    return found


def _check_columns(table: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"table: it has no columns {missing}, only {', '.join(map(str, table.columns))}")

"""What a notebook claims, as effects over seeds that could have come out otherwise, with its checks and its laws."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd

from clkit import checks
from clkit.checks import Range
from clkit.experiments.statistics import difference, holm, p_value, verdict

LEAST, DRAWS, MOST = 5, 100, 0.1
COLUMNS = ("key", "text", "effect", "lower", "upper", "n", "p", "verdict", "scale", "paper")
Effect = tuple[str, str] | Callable[[pd.DataFrame], Mapping[Any, float] | pd.Series]
Columns = str | tuple[str, ...]
Number = Annotated[float, Range()]


class _Lines:
    """Sentences that a notebook collects and, when it is done, prints and writes beside its figures."""

    kind, everywhere = "", False

    def __init__(self, page: Any) -> None:
        self.page = page
        self.rows: list[dict[str, Any]] = []

    def _complain(self, error: Exception) -> None:
        """Raises the error, or prints it where numbers may be others than those recorded."""
        if (self.everywhere or self.page.profile == "fast") and not self.page.changed:
            raise error
        print(error)


class Checks(_Lines):
    """What keeps a notebook's text in step with its numbers; of these `done` prints how many are right.

    One that is wrong raises in the fast profile with the recorded parameters; elsewhere it is printed.
    """

    kind = "checks"

    def check(self, text: str, holds: Any) -> None:
        """Records whether it is right; `holds` is what was found."""
        if not isinstance(holds, bool | np.bool_):
            raise TypeError(f"holds: {text!r} got a {type(holds).__name__}; give True or False, of an array .all()")
        if any(row["text"] == text for row in self.rows):
            raise ValueError(f"text: {text!r} is checked twice; give each its own sentence")
        self.rows.append({"text": text, "holds": bool(holds)})

    def done(self) -> None:
        """Prints how many are right, writes them beside the figures, and raises for those that are not."""
        wrong = [repr(row["text"]) for row in self.rows if not row["holds"]]
        print(f"{self.kind}: {len(self.rows) - len(wrong)} of {len(self.rows)}")
        self.page._record(self.kind, self.rows)
        if wrong:
            self._complain(AssertionError(f"{self.kind}: {len(wrong)} of {len(self.rows)} wrong: {'; '.join(wrong)}"))


class Laws(Checks):
    """What must hold in any profile and on any machine; of these `done` prints how many do."""

    kind, everywhere = "laws", True


class Claims(_Lines):
    """Sentences of a paper, or what was found instead, each an effect over seeds with an interval and a verdict.

    ```python
    claims = page.claims()
    claims.claim("er-gains", "CLeWI raises ER's accuracy", rows, ("ER + CLeWI", "ER"), paper="abstract, 2")
    claims.done()
    ```

    Verdicts, at 5 % after Holm's correction over all claims of the notebook: "holds"; "does not hold", where the
    opposite is established; "open" otherwise. A claim must be able to fail. So its effect is measured again on tables
    whose labels were shuffled; if it holds on more than a tenth of these, `done` raises.
    """

    kind = "claims"

    @checks.arguments
    def claim(
        self,
        key: str,
        text: str,
        table: pd.DataFrame,
        effect: Effect,
        *,
        shuffle: Columns = "method",
        within: Columns = ("seed",),
        value: str = "acc",
        above: Number | None = None,
        below: Number | None = None,
        within_margin: Annotated[float, Range(0, open="low")] | None = None,
        paper: str = "",
        scale: Literal["fast", "real", "paper"] = "fast",
    ) -> None:
        """Claims that an effect lies above a number (by default 0), below one, or less than a margin away from 0.

        `effect` is a pair of labels (a, b) of the column `shuffle`: the mean `value` of a less that of b, seed by seed.
        Or it is a function from a table to a number for each seed. Any selection, a maximum say, belongs into it, made
        from the rows as they were measured: what holds by construction then shows on shuffled tables.

        The columns `shuffle` are permuted together among the rows that agree in `within`, 100 times. That two methods
        are alike can only fail in a table with a third that differs. The mean has Student's paired 95 % interval and
        two-sided p, against the nearer end of what is claimed (a margin: two one-sided tests, Schuirmann 1987).
        Raises ValueError for fewer than five seeds; at the real scale these are "open".
        """
        ends = {"above": above, "below": below, "within_margin": within_margin}
        given = [name for name, end in ends.items() if end is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: {key!r} has {given[0]}, too; give one of above, below and within_margin")
        low, high = -math.inf if below is not None else above or 0.0, math.inf if below is None else below
        if within_margin is not None:
            low, high = -within_margin, within_margin
        if any(key == row["key"] or text == row["text"] for row in self.rows):
            raise ValueError(f"key: {key!r} or its text is claimed twice; give each its own")
        shuffle, within = ((c,) if isinstance(c, str) else c for c in (shuffle, within))
        uses = {"table": ["seed"], "shuffle": shuffle, "within": within, "value": [] if callable(effect) else [value]}
        for argument, column in ((name, column) for name in uses for column in uses[name]):
            checks.choice(f"{argument}: of {key!r} the column", column, table.columns)
        measure = effect if callable(effect) else _gap(table, key, *effect, shuffle[0], value)
        found = _measured(measure, table, key)
        mean, lower, upper, n = difference(found)
        if n < LEAST and scale != "real" and not self.page.changed:
            raise ValueError(f"effect: of {key} it has {n} seeds; give five at least; at scale='real' fewer are open")
        nulls = [_measured(measure, rows, f"{key}, shuffled") for rows in _shuffled(table, shuffle, within)]
        if not self.page.changed and all(np.array_equal(null, found) for null in nulls):
            raise ValueError(f"shuffle: {shuffle} changes nothing of {key!r}; name what its effect compares")
        chance = np.mean([verdict(null.mean(), p_value(null, low, high), low, high) == "holds" for null in nulls])
        p = p_value(found, low, high)
        scale = "paper" if scale == "fast" and self.page.profile == "paper" else scale
        note = "fewer than five seeds" if n < LEAST else "every seed gives the same" if math.isnan(p) else ""
        self.rows.append(
            {"key": key, "text": text, "paper": paper, "scale": scale}
            | {"claimed": [low, high], "effect": mean, "lower": lower, "upper": upper, "n": n, "p": p}
            | {"null": float(chance), "gaps": found.tolist(), "note": note}
        )

    def table(self) -> pd.DataFrame:
        """The claims so far, a row each: effect, 95 % interval, seeds, p after Holm's correction, verdict."""
        rows = pd.DataFrame([row | {"p": row["holm"]} for row in self._judged()], columns=list(COLUMNS))
        return rows.set_index("key").round(4)

    def done(self) -> None:
        """Prints a line for each claim, without numbers, and writes all beside the figures.

        Raises ValueError for one that cannot fail, AssertionError where a verdict differs from its record. With
        changed parameters, and in other profiles than the fast one, it prints these, and goes on.
        """
        rows = self._judged()
        for row in rows:
            print(f"{row['verdict']}: {row['text']}" + (row["note"] and f" ({row['note']})"))
        if forced := [row["key"] for row in rows if row["null"] > MOST]:
            self._complain(ValueError(f"claims: {forced} hold on shuffled tables, too; claim more than chance gives"))
        parts = (rows, self.page.recorded.get("claims", rows))  # of a new notebook nothing is recorded
        found, known = ({row["key"]: row["verdict"] for row in part} for part in parts)
        other = [key for key in known | found if found.get(key) != known.get(key)]
        if other:
            told = "; ".join(f"{key!r} was {known.get(key)}, is {found.get(key)}" for key in other)
            self._complain(AssertionError(f"claims: {told}; clkit figures --write records what is"))
        self.page._record(self.kind, rows)

    def _judged(self) -> list[dict[str, Any]]:
        """The rows with p after Holm's correction and verdicts; what has too few seeds is not tested."""
        adjusted = holm([math.nan if row["note"] else row["p"] for row in self.rows]).tolist()
        return [
            row | {"holm": p, "verdict": verdict(row["effect"], p, *row["claimed"])}
            for row, p in zip(self.rows, adjusted, strict=True)
        ]


def _gap(table: pd.DataFrame, key: str, a: str, b: str, column: str, value: str) -> Callable[[pd.DataFrame], pd.Series]:
    """What measures the mean of `value` where `column` is `a` less that where it is `b`, by seed; a pair for each."""
    for label in (a, b):
        checks.choice(f"{key}: {column}", label, table[column].unique())
    sizes: Any = table.groupby([column, "seed"])[value].count()
    if not sizes[a].equals(sizes[b]):
        raise ValueError(f"{key}: {a!r} and {b!r} are not paired by seed; run both with every seed")

    (place, seeds), values = pd.factorize(table["seed"], sort=True), table[value].to_numpy(float)

    def mean(chosen: np.ndarray) -> np.ndarray:
        sums, counts = (np.bincount(place[chosen], by, len(seeds)) for by in (values[chosen], None))
        return np.divide(sums, counts, where=counts > 0, out=np.full(len(seeds), np.nan))

    def gap(rows: pd.DataFrame) -> pd.Series:  # by numpy, for it is called a hundred times
        labels = rows[column].to_numpy()
        return pd.Series(mean(labels == a) - mean(labels == b), seeds)

    return gap


def _measured(effect: Callable[[pd.DataFrame], Any], rows: pd.DataFrame, key: str) -> np.ndarray:
    """The effect of every seed; ValueError that names the claim where there is none."""
    with checks.explained(f"effect: of {key} it raises", "give a function from any such table to a number a seed"):
        found = pd.Series(effect(rows), dtype=float)
    if not 0 < len(found) == len({*found.index} & {*rows["seed"]}) or not np.isfinite(found).all():
        raise ValueError(f"effect: of {key} it is {found.to_dict()!s:.200}; give a finite number for each seed")
    return found.to_numpy()


def _shuffled(table: pd.DataFrame, columns: tuple[str, ...], within: tuple[str, ...]) -> Iterator[pd.DataFrame]:
    """The table 100 times, columns permuted together among rows that agree in others; the same tables every time."""
    groups, generator = table.groupby(list(within), sort=False, dropna=False).ngroup(), np.random.default_rng(0)
    places, order = np.argsort(groups, kind="stable"), np.empty(len(table), int)
    for _ in range(DRAWS):
        order[places] = np.lexsort((generator.random(len(table)), groups))
        yield table.assign(**{column: table[column].to_numpy()[order] for column in columns})

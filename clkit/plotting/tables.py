"""Numbers side by side: accuracy matrices, methods as bars, gains with their intervals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from clkit.plotting.common import check_columns, scaled
from clkit.plotting.style import BLACK, BLUE, GREY, LABELS, RED, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


def accuracy_matrix(ax: "Axes", matrix: ArrayLike, *, names: Sequence[str] | None = None, whole: bool = False) -> None:
    """A heat map of accuracies in percent: row t after learning task t, column k the test on task k.

    Tasks not learned yet are left blank, unless the `whole` matrix is asked for. Numbers are written into up to 12
    tasks.
    """
    a = np.asarray(matrix, dtype=float)
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"matrix: the shape is {a.shape}; pass (tasks, tasks), as Result.accuracy is")
    tasks = len(a)
    blank = np.zeros_like(a, dtype=bool) if whole else np.triu(np.ones_like(a, dtype=bool), 1)
    shown = np.ma.masked_where(blank, 100 * a)
    ax.grid(False)
    image = ax.imshow(shown, cmap="viridis", vmin=0, vmax=100)
    ticks = range(0, tasks, 1 + tasks // 13)
    labels = [names[t] if names else str(t + 1) for t in ticks]
    ax.set_xticks(ticks, labels)
    ax.set_yticks(ticks, labels)
    ax.set_xlabel("accuracy on task (%)")
    ax.set_ylabel("after learning task")
    ax.spines[:].set_visible(False)
    if tasks > 12:
        ax.figure.colorbar(image, ax=ax, shrink=0.8)
        return
    for row, column in np.argwhere(~blank).tolist():
        number = 100 * a[row, column]
        ink = "white" if number < 60 else "black"
        ax.text(column, row, f"{number:.0f}", ha="center", va="center", color=ink, fontsize=8)


def bars(
    ax: "Axes",
    table: "DataFrame",
    value: str = "acc",
    *,
    by: str = "method",
    level: float = 0.95,
    shades: Mapping[str, str] = {},
) -> None:
    """Compares methods: a bar to the mean over seeds, a dot a seed, and Student's `level` confidence interval.

    The table has a row for each seed of each method. Methods keep the order of the table, first on top. One seed
    gets no interval. `shades` gives methods other colours than their own, kinds of them one colour, say.
    """
    from scipy.stats import t as student

    check_columns(table, by, value)
    names = list(dict.fromkeys(table[by]))
    for place, (name, colour) in enumerate((colours(names) | dict(shades)).items()):
        points = np.asarray(scaled(value, table.loc[table[by] == name, value]), dtype=float)
        ax.barh(place, points.mean(), color=colour, alpha=0.55, height=0.7)
        spread = np.linspace(-0.18, 0.18, len(points)) if len(points) > 1 else [0]
        ax.plot(points, place + np.asarray(spread), "o", color=colour, markersize=3.5, markeredgecolor="white", mew=0.4)
        if len(points) > 1:
            half = student.ppf((1 + level) / 2, len(points) - 1) * points.std(ddof=1) / len(points) ** 0.5
            ax.errorbar(points.mean(), place, xerr=half, color="black", capsize=3, linewidth=1.2)
    ax.set_yticks(range(len(names)), [str(name) for name in names])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel(LABELS.get(value, value))


def gains(
    ax: "Axes", table: "DataFrame", others: Mapping[str, str] = {}, *, label: str = "gain in average accuracy (points)"
) -> None:
    """What was gained by name: a dot with its interval, and hollow marks where others found the gain.

    A row of the table for each name, its index, with the columns gain, lower and upper, shares of 1, and those that
    `others` name (their labels are its values); names keep their order, first on top. Dots are filled blue where the
    interval lies above 0, red where it lies below, and grey where it does not tell.
    """
    check_columns(table, "gain", "lower", "upper", *others)
    for place, (gain, lower, upper) in enumerate(100 * table[["gain", "lower", "upper"]].to_numpy(float)):
        colour = BLUE if lower > 0 else RED if upper < 0 else GREY
        ax.plot([lower, upper], [place, place], color=colour, linewidth=1.4)
        ax.plot(gain, place, "o", color=colour, markersize=5.5)
    for (column, name), mark in zip(others.items(), "sD^v", strict=False):
        ax.plot(100 * table[column], range(len(table)), mark, color=BLACK, mfc="none", mew=0.8, label=name, ls="none")
    ax.axvline(0, color=BLACK, linewidth=0.8)
    ax.set_yticks(range(len(table)), [str(name) for name in table.index])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel(label)
    if others:
        ax.legend()

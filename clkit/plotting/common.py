"""What drawings have in common: checks of tables, a colour a method, seeds thin and their mean thick."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clkit.plotting.style import BLUE, THIN, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


def one_of(argument: str, value: str, known: Sequence[str]) -> None:
    """Raises ValueError, with the choices, for a value that is not known."""
    if value not in known:
        raise ValueError(f"{argument}: {value!r} is unknown; choose one of {', '.join(known)}")


def check_columns(table: "DataFrame", *wanted: str) -> None:
    """Raises KeyError for columns that a table lacks, ValueError for one without rows."""
    missing = [name for name in wanted if name not in table]
    if missing:
        raise KeyError(f"table: it has no column {', '.join(missing)}, only {', '.join(map(str, table.columns))}")
    if not len(table):
        raise ValueError("table: it has no rows; run something first")


def by_method(table: "DataFrame") -> Iterator[tuple[str, str, Any]]:
    """The methods of a table in their order: name, colour and rows; a table without the column is one method."""
    if "method" not in table:
        yield "mean over seeds", BLUE, table
        return
    for name, colour in colours(table["method"]).items():
        yield name, colour, table[table["method"] == name]


def scaled(value: str, numbers: Any) -> Any:
    """Shares become percent, losses stay."""
    return numbers if value == "loss" else 100 * numbers


def thin_and_mean(ax: "Axes", x: Any, lines: list[np.ndarray], colour: Any, name: str, **mark: Any) -> None:
    """Draws a thin line a seed, where there are several, and their mean."""
    if len(lines) > 1:
        for line in lines:
            ax.plot(x, line, color=colour, **THIN)
    ax.plot(x, np.mean(lines, 0), color=colour, label=name, **mark)


def legend(ax: "Axes") -> None:
    """Adds a legend where there is more than one thing to name."""
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend()


def shades(count: int) -> list[Any]:
    """So many colours from dark to light."""
    import matplotlib as mpl

    return [mpl.colormaps["viridis"](0.9 * i / max(count - 1, 1)) for i in range(count)]

"""The look of all figures: colours, labels, matplotlib's settings. A method has its colour wherever it appears."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from pandas import DataFrame

# Every colour has a contrast of at least 3 on white. Those of the palette can be told apart, also by people with
# colour-vision deficiencies; it began as that of Okabe and Ito, which is made for darker paper.
BLACK, GREY, BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#000000", "#8A8A8A", "#0072B2", "#CB8301", "#008056", "#BD4900", "#A14B87", "#5998CC",
)  # fmt: skip
WINE, OLIVE, INDIGO = "#861E53", "#8F9241", "#35258B"
PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, WINE, OLIVE, INDIGO, GREY)

COLOURS: Mapping[str, str] = {
    "fine-tuning": GREY, "joint": BLACK, "per task": "#7A74B7", "data buffer": "#9C6FE8", "buffer": "#9C6FE8",
    "memory only": "#9D8C77", "ER": SKY, "ER-ACE": "#297B74", "A-GEM": "#AF8E2D", "GEM": "#184C3E", "MIR": "#5998AD",
    "DER": "#786DE4", "DER++": INDIGO, "GDumb": "#B17A45", "iCaRL": "#942D82", "BiC": "#CA3211",
    "L2": "#856B00", "decoupled L2": "#917F00", "EWC": WINE, "online EWC": "#FC2D7E", "SI": "#EB6B60",
    "MAS": "#653311", "LwF": "#52833F",
    "CLeWI": BLUE, "ER + CLeWI": BLUE, "SFA": GREEN, "AWM": PURPLE, "HCMM": RED, "WiSE-FT": ORANGE,
    "average": GREY, "task arithmetic": ORANGE, "model stock": "#73492E", "TIES": BLUE, "DARE": SKY,
    "DARE TIES": "#45A18F", "DELLA": WINE, "PCB": INDIGO, "MagMax": GREEN, "RegMean": OLIVE, "Iso-C": PURPLE,
    "TSV": RED, "EMR": BLACK,
    "plain": GREY, "plain, re-estimated": SKY, "plain, restored": SKY,
    "aligned": ORANGE, "aligned, re-estimated": BLUE, "aligned, restored": BLUE,
    "ordinary": BLUE, "tangent": RED,
    "class-incremental": "#BC5769", "domain-incremental": "#B88619", "task-incremental": "#044386",
}  # fmt: skip

LABELS: Mapping[str, str] = {
    "acc": "average accuracy (%)",
    "accuracy": "test accuracy (%)",
    "loss": "test loss",
    "last": "accuracy on the last task (%)",
    "forgetting": "forgetting (%)",
    "plasticity": "accuracy just after learning (%)",
    "bwt": "backward transfer (%)",
    "fwt": "forward transfer (%)",
    "alpha": "α: weight of the old network",
    "beta": "β: weight of the old network",
    "p": "p: merge interval, share of a task",
    "strength": "strength of the pull",
    "old": "accuracy on earlier tasks (%)",
    "new": "accuracy on the newest task (%)",
    "old_bits": "bits per byte, earlier domains",
    "new_bits": "bits per byte, newest domain",
}
LETTERS: Mapping[str, str] = {"alpha": "α", "beta": "β", "strength": "λ"}
LESS_IS_MORE = ("forgetting", "loss", "old_bits", "new_bits")  # their axes run backwards where up is to be stable

RC: Any = {
    "font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8, "legend.edgecolor": "none", "legend.framealpha": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE), "axes.grid": True, "grid.color": "#E5E5E5", "grid.linewidth": 0.6,
    "lines.linewidth": 2.0, "lines.markersize": 4.5,
    "figure.dpi": 100, "figure.constrained_layout.use": True, "savefig.dpi": 200,
    "svg.fonttype": "none", "svg.hashsalt": "clkit",
}  # fmt: skip
THIN: Mapping[str, Any] = {"linewidth": 0.7, "alpha": 0.45}
BESIDE: Mapping[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}  # where a legend covers nothing


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, for axes that are made inside."""

    with mpl.rc_context(RC):
        yield


def family(name: str) -> str:
    """The method that a name is a variant of: SFA for "SFA p=0.25, uniform", AWM for "AWM 4".

    It is the longest name in `COLOURS` that the name begins with, whatever its capitals, hyphens and underscores; else
    what stands before the first number, comma, plus, colon, bracket or equals sign.
    """
    key = _key(name)
    known = [k for k in _KNOWN if key == k or (key.startswith(k) and not key[len(k)].isalnum())]
    plain = re.split(r"\s*(?:[,(=:+]|-?\d)", name)[0] or re.sub(r"[\d.]+", "", name).strip()
    return _KNOWN[max(known, key=len)] if known else plain


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, that of its method; a variant of the method before it is darker.

    A method that is not in `COLOURS` has the same colour of the palette in every figure. Where another method of the
    figure has a method's colour, the later one takes a free one. Variants of one unknown method go from dark to light.
    """
    return {name: look["color"] for name, look in looks(names).items()}


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour as `colours` gives it, a dash and a marker for each name, as arguments of matplotlib's `plot`."""
    families: dict[str, list[str]] = {}
    order = list(dict.fromkeys(names))
    for name in sorted(order, key=lambda name: name not in COLOURS):  # a method comes before its variants
        families.setdefault(family(name), []).append(name)
    if len(families) == 1 < len(order) and not families.keys() & COLOURS.keys():
        return {name: {"color": c, "marker": "o"} for name, c in zip(order, shades(len(order)), strict=True)}
    found, given, taken = {}, set[str](), {COLOURS[method] for method in families if method in COLOURS}
    for method, variants in families.items():
        start = crc32(method.encode()) % len(PALETTE)
        free = [c for c in PALETTE[start:] + PALETTE[:start] if c not in taken] or PALETTE[start:]
        colour = free[0] if COLOURS.get(method) in (None, *given) else COLOURS[method]
        given.add(colour)
        taken.add(colour)
        for i, name in enumerate(variants):
            light = 1 - i * min(0.45, 0.65 / max(len(variants) - 1, 1))
            darker = "#" + "".join(f"{round(light * int(colour[k : k + 2], 16)):02X}" for k in (1, 3, 5))
            look = {"linestyle": ("-", "--", "-.", ":")[i % 4], "marker": "os^Dv"[i % 5]}
            found[name] = look | {"color": darker}
    return {name: found[name] for name in order}


def categories(names: Iterable[str]) -> dict[str, str]:
    """The palette's colours one after the other, for names that are no methods."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def shades(count: int) -> list[str]:
    """So many colours in order, from dark to as light as can be seen on white."""
    from matplotlib import colormaps, colors

    return [colors.to_hex(colormaps["inferno"](0.1 + 0.55 * i / max(count - 1, 1))) for i in range(count)]


def check_columns(table: DataFrame, *wanted: str) -> None:
    """Raises KeyError for columns that a table lacks, ValueError for one without rows."""
    missing = [name for name in wanted if name not in table]
    if missing:
        raise KeyError(f"table: it has no column {', '.join(missing)}, only {', '.join(map(str, table.columns))}")
    if not len(table):
        raise ValueError("table: it has no rows; run something first")


def groups(table: DataFrame, by: str) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """The name, the look (as in `looks`) and the rows of each value of the column `by`, in the order of the table.

    Numbers come in their own order. A table without the column is one group.
    """
    names: Any = table[by].astype(str) if by in table else np.full(len(table), "mean over seeds")
    if by in table and table[by].dtype.kind in "if":
        table = table.sort_values(by, kind="stable")
        names = table[by].map(lambda value: f"{LETTERS.get(by, by)} = {value:g}")
    for name, look in looks(names).items():
        yield name, look, table[names == name]


def axis_label(column: str) -> str:
    """The axis label of a column, by default its name."""
    return LABELS.get(column, column)


def factor(label: str) -> float:
    """What numbers are multiplied by under an axis label: 100 if it says "(%)" or "(points)", else 1."""
    return 100.0 if "(%)" in label or "(points)" in label else 1.0


def scaled(table: DataFrame, *columns: str) -> DataFrame:
    """The table with these columns as their labels say that they are drawn: shares of 1 in percent."""
    return table.assign(**{name: factor(axis_label(name)) * table[name] for name in columns})


def legend(ax: Axes, of: Axes | None = None) -> None:
    """Adds a legend, of these axes or of others, beside the axes, if there is more than one thing to name."""
    handles, names = (of or ax).get_legend_handles_labels()
    if len(names) > 1:
        ax.legend(handles, names, **BESIDE)


def _key(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")


_KNOWN = {_key(name): name for name in COLOURS}

"""What networks represent: features in the plane, tables of CKA, variance along depth, spectra, mismatch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clkit.plotting.common import check_columns, legend, one_of, thin_and_mean
from clkit.plotting.style import BLACK, GREY, PALETTE, THIN, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

MARKS = "o^sDvP"
MEASURES: Mapping[str, str] = {
    "cka": "CKA",
    "l1": "mean |Δ|",
    "l2": "mean distance",
    "cosine": "1 − cosine",
}


def embedding(
    ax: "Axes",
    points: "DataFrame",
    agreement: "DataFrame",
    *,
    measures: Sequence[str] = ("cka", "l2"),
    title: str = "",
    names: Sequence[str] | None = None,
    joined: bool = False,
) -> None:
    """The features of one or more classes under several models in one plane, and the numbers they illustrate.

    `points` and `agreement` are those of `representation.embed`. A marker for each model (circles, triangles, squares,
    ..., as in HCMM, arXiv 2509.23592, figure 5); a colour for each class, named by `names`, or for each model if there
    is one class. Distances in such a picture prove nothing, so the `measures` of each pair of models over all examples
    shown stand above it, below the `title`. `joined` draws a line from each example under a model to the same example
    under the next one.
    """
    check_columns(points, "model", "class", "example", "x", "y")
    check_columns(agreement, "first", "second", "class", *measures)
    for measure in measures:
        one_of("measures", measure, tuple(MEASURES))
    models, classes = list(dict.fromkeys(points["model"])), sorted(set(points["class"]))
    if len(models) < 2 or len(models) > len(MARKS):
        raise ValueError(f"points: {len(models)} models; give 2 to {len(MARKS)}, to be compared")
    shared: Any = agreement[agreement["class"] == "all"].set_index(["first", "second"])
    pairs = [(a, b) for i, a in enumerate(models) for b in models[i + 1 :]]
    if missing := [pair for pair in pairs if pair not in shared.index]:
        raise ValueError(f"agreement: it says nothing of {missing[0]}; pass that of the same embedding")
    single = len(classes) == 1
    if joined:
        for _, way in points.groupby(["class", "example"], sort=False):
            ax.plot(way["x"], way["y"], color=GREY, **THIN)
    for mark, model, own in zip(MARKS, models, PALETTE, strict=False):
        for c, colour in zip(classes, PALETTE, strict=False):
            spots = points[(points["model"] == model) & (points["class"] == c)]
            ax.plot(spots["x"], spots["y"], mark, color=own if single else colour, ls="none", markersize=3.5,
                    alpha=0.7, mew=0)  # fmt: skip
        ax.plot([], [], mark, color=own if single else BLACK, ls="none", label=model)
    if not single:
        for c, colour in zip(classes, PALETTE, strict=False):
            ax.plot([], [], "s", color=colour, ls="none", label=names[c] if names else f"class {c}")
    lines = [title] if title else []
    for a, b in pairs:
        row = shared.loc[(a, b)]
        numbers = ", ".join(f"{MEASURES[m]} {row[m]:.2f}" for m in measures)
        lines.append(numbers if len(pairs) == 1 else f"{a} – {b}: {numbers}")
    ax.set_title("\n".join(lines), fontsize=8)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, handletextpad=0.1, columnspacing=1)


def similarities(ax: "Axes", table: "DataFrame", *, label: str = "CKA", numbers: bool = True) -> None:
    """A heat map of `representation.cka_by_layer`: a row for each layer of one network, a column for the other's.

    The input is at the bottom left. Numbers are written into tables of up to 8 layers.
    """
    a = table.to_numpy(float)
    ax.grid(False)
    image = ax.imshow(a, cmap="viridis", vmin=0, vmax=1, origin="lower")
    ax.set_xticks(range(a.shape[1]), [str(name) for name in table.columns], rotation=60)
    ax.set_yticks(range(len(a)), [str(name) for name in table.index])
    ax.spines[:].set_visible(False)
    if max(a.shape) > 8 or not numbers:
        ax.figure.colorbar(image, ax=ax, shrink=0.8, label=label)
        return
    for row, column in np.ndindex(a.shape):
        ink = "white" if a[row, column] < 0.6 else "black"
        ax.text(column, row, f"{a[row, column]:.2f}", ha="center", va="center", color=ink, fontsize=7)


def along_layers(
    ax: "Axes",
    table: "DataFrame",
    value: str = "ratio",
    *,
    by: str = "variant",
    label: str = "variance left, as a share of the parents'",
    level: float | None = 1.0,
) -> None:
    """`value` layer by layer, a colour for each of `by`; with a column seed, a thin line a seed and their mean.

    For `representation.variance_ratio` and `collapse`, and any table with the columns layer, `by` and `value`, its
    layers in the order in which they run. A dotted line is at `level`.
    """
    check_columns(table, "layer", by, value)
    layers = list(dict.fromkeys(table["layer"]))
    for name, colour in colours(table[by]).items():
        rows: Any = table[table[by] == name].assign(seed=lambda t: t["seed"] if "seed" in t else 0)
        grid = rows.pivot_table(index="layer", columns="seed", values=value, sort=False).loc[layers]
        thin_and_mean(ax, range(len(layers)), list(grid.to_numpy().T), colour, name, marker="o")
    if level is not None:
        ax.axhline(level, color=BLACK, linestyle=":", linewidth=1)
    ax.set_xticks(range(len(layers)), layers)
    ax.set_ylabel(label)
    legend(ax)


def spectra(ax: "Axes", tables: "Mapping[str, DataFrame]") -> None:
    """Correlations of the units of one network with their partners in another, largest first, a colour for each name.

    The tables are those of `representation.matched`: dashed, unit i with unit i; broad, after the best matching.
    """
    for table in tables.values():
        check_columns(table, "kind", "rank", "correlation")
    for name, colour in colours(tables).items():
        for kind, line, width in (("matched", "-", 4.0), ("as they are", "--", 1.5)):
            rows = tables[name][tables[name]["kind"] == kind]
            at = (rows["rank"] + 0.5) / len(rows)
            ax.plot(100 * at, rows["correlation"], line, color=colour, label=f"{name}, {kind}", linewidth=width,
                    alpha=0.45 if kind == "matched" else 1)  # fmt: skip
    ax.set(ylim=(None, 1.05), xlabel="units, by correlation (%)", ylabel="correlation with the partner")
    ax.legend()


def before_after(ax: "Axes", table: "DataFrame", before: str, after: str, *, by: str, label: str) -> None:
    """Two columns of a table beside each other, by name: hollow before, filled after, a line a row, first on top.

    The table has a row for each seed and value of `by`; rows of a name lie close together.
    """
    check_columns(table, by, before, after)
    names = list(dict.fromkeys(table[by]))
    for place, (name, colour) in enumerate(colours(map(str, names)).items()):
        rows = table[table[by].map(str) == name]
        at = place + np.linspace(-0.25, 0.25, len(rows) + 2)[1:-1]
        ax.hlines(at, rows[before], rows[after], color=colour, linewidth=0.8)
        ax.plot(rows[before], at, "o", color=colour, mfc="white", markersize=4)
        ax.plot(rows[after], at, "o", color=colour, markersize=4)
    ax.set_yticks(range(len(names)), [str(name) for name in names])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel(label)


def against(ax: "Axes", table: "DataFrame", x: str, y: str, *, by: str = "method", scale: float = 100.0) -> None:
    """`y` times `scale`, by default in percent, against `x`: a dot a row, a colour for each of `by`."""
    check_columns(table, x, y, by)
    for name, colour in colours(table[by]).items():
        rows = table[table[by] == name]
        ax.plot(rows[x], scale * rows[y], "o", color=colour, label=name)

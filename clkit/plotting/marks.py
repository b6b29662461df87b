"""Marks: heat maps, planes and pictures, methods as bars or points, gains with their intervals, dots and clouds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from clkit import checks
from clkit.landscape import Plane
from clkit.plotting import common

MARKS = "o^sDvP"
MEASURES: Mapping[str, str] = {"cka": "CKA", "l1": "mean |Δ|", "l2": "mean distance", "cosine": "1 − cosine"}


def heatmap(
    ax: Axes, table: pd.DataFrame, *, blank: Any = None, top: float = 1.0, digits: int = 2, label: str = ""
) -> None:
    """A table of numbers from 0 to `top` as colours, its index down and its columns across.

    Numbers are written, with so many `digits`, into tables of up to 8 rows and columns, without digits 12; larger ones
    get a colour bar, named `label`. Where `blank`, an array of the table's shape, is true, nothing is drawn.
    """

    few = max(table.shape) <= (8 if digits else 12)
    sns.heatmap(table, mask=blank, vmin=0, vmax=top, cmap="viridis", square=True, annot=few, annot_kws={"fontsize": 7},
                fmt=f".{digits}f", cbar=not few, cbar_kws={"label": label, "shrink": 0.8}, ax=ax)  # fmt: skip
    ax.tick_params(length=0)
    ax.tick_params(axis="y", rotation=0)
    ax.grid(False)


def accuracy_matrix(ax: Axes, matrix: ArrayLike, *, names: Sequence[str] | None = None, whole: bool = False) -> None:
    """A heat map of accuracies in percent: row t after learning task t, column k the test on task k.

    `matrix` has the shape (tasks, tasks); ValueError for another one. Tasks not learned yet are left blank, unless the
    `whole` matrix is asked for. Numbers are written into up to 12 tasks. The middle of the first cell is (0.5, 0.5).
    """

    a = np.asarray(matrix, dtype=float)
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"matrix: the shape is {a.shape}; pass (tasks, tasks), as Result.accuracy is")
    tasks: Any = names or range(1, len(a) + 1)
    blank = None if whole else np.triu(np.ones_like(a, dtype=bool), 1)
    heatmap(ax, pd.DataFrame(100 * a, tasks, tasks), blank=blank, top=100, digits=0)
    ax.set(xlabel="accuracy on task (%)", ylabel="after learning task")


def plane(ax: Axes, plane: Plane, *, value: str = "accuracy", names: Sequence[str] = ("a", "b", "c")) -> None:
    """Contours of accuracy (or `value="loss"`) over a plane as `landscape.plane` gives it, its three corners named."""
    checks.choice("value", value, ("accuracy", "loss"))
    numbers = common.factor(common.LABELS[value]) * getattr(plane, value)
    shading = ax.contourf(plane.xs, plane.ys, numbers, levels=15, cmap="viridis")
    ax.figure.colorbar(shading, ax=ax, label=common.LABELS[value], shrink=0.9)
    for (x, y), name in zip(plane.corners, names, strict=True):
        ax.plot(x, y, "o", color="white", markeredgecolor="black")
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        ax.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8, bbox=box)
    ax.set_aspect("equal")
    ax.grid(False)
    ax.set(xlabel="distance in weight space", ylabel="distance in weight space")


def examples_grid(ax: Axes, stream: Any, columns: int = 10) -> None:
    """Training images as they are stored: a row for each task of the stream, its classes taking turns.

    Raises ValueError for inputs that are no images.
    """
    tiles, names = [], []
    for task in stream.tasks:
        labels, shown = task.train.y.cpu().numpy(), [stream.classes[c] for c in task.classes]
        if task.train.x.ndim != 4:
            raise ValueError(f"stream: inputs of shape {stream.shape} are no images; only (C, H, W) can be shown")
        turns = [np.flatnonzero(labels == c)[i : i + 1] for i in range(columns) for c in task.classes]
        images = _images(task.train.x[np.concatenate(turns)[:columns].tolist()].cpu().numpy())
        tiles.append(np.concatenate([images, np.ones((columns - len(images), *images.shape[1:]))]))
        text = ", ".join(shown[:4]) + (", …" if len(shown) > 4 else "")
        names.append(f"{task.index + 1}: {task.name if stream.scenario == 'domain' else text}")
    grid = np.pad(np.stack(tiles), [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], constant_values=1.0)
    tasks, _, height, width, channels = grid.shape
    sheet = grid.transpose(0, 2, 1, 3, 4).reshape(tasks * height, columns * width, channels)
    ax.imshow(sheet.squeeze(-1) if channels == 1 else sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_yticks(height * (np.arange(tasks) + 0.5), names)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def bars(
    ax: Axes,
    table: pd.DataFrame,
    value: str = "acc",
    *,
    by: str = "method",
    shades: Mapping[str, str] = {},
    filled: bool = True,
) -> None:
    """Compares methods: a bar from 0 to the mean over seeds, a dot a seed, and Student's 95 % confidence interval.

    The table has a row for each seed of each method. Methods keep the order of the table, first on top. One seed
    gets no interval, and that of shares stays between 0 and 1. Variants of a method have its colour; `shades` gives
    methods other ones, kinds of them one colour, say. Unless `filled`, a point stands for the bar, and the axis need
    not begin at 0.
    """
    from scipy.stats import t as student

    common.check_columns(table, by, value)
    label = common.axis_label(value)
    shown: Any = common.scaled(table[[by, value]].astype({by: str}), value)  # type: ignore[arg-type]
    share = common.factor(label) > 1 and shown[value].min() >= 0

    def interval(seeds: Any) -> tuple[float, float]:
        low, high = student.interval(0.95, len(seeds) - 1, seeds.mean(), seeds.sem())
        return (max(low, 0), min(high, 100)) if share else (low, high)

    methods = {name: common.family(name) for name in shown[by]}
    colours = common.colours(methods.values())
    own = {name: colours[method] for name, method in methods.items()} | dict(shades)
    drawn: Any = {"data": shown, "x": value, "y": by, "hue": by, "palette": own, "errorbar": interval, "capsize": 0.25,
                  "err_kws": {"color": "black", "linewidth": 1.2}, "legend": False, "ax": ax}  # fmt: skip
    if filled:
        sns.barplot(**drawn, alpha=0.55, width=0.7, saturation=1)
    else:
        sns.pointplot(**drawn, linestyle="none", markersize=6.5)
    for place, name in enumerate(methods):
        seeds = shown.loc[shown[by] == name, value]
        at = place + np.linspace(0.12, 0.3, len(seeds))
        ax.plot(seeds, at, "o", color=own[name], markersize=4, mec="white", mew=0.5)
    _rows(ax, list(methods), label)


def gains(
    ax: Axes, table: pd.DataFrame, others: Mapping[str, str] = {}, *, label: str = "gain in average accuracy (points)"
) -> None:
    """What was gained by name: a dot with its interval, and hollow marks where others found the gain.

    The table has a row for each name, its index. Its columns gain, lower and upper, and those that `others` name, are
    shares of 1; the values of `others` are their labels. Names keep their order, first on top. Dots are blue where the
    interval lies above 0, red where it lies below, and grey where it does not tell.
    """
    common.check_columns(table, "gain", "lower", "upper", *others)
    shown: Any = common.factor(label) * table[["gain", "lower", "upper", *others]]
    places, signs = range(len(table)), (shown["lower"] > 0).astype(int) - (shown["upper"] < 0)
    colours = signs.map({1: common.BLUE, 0: common.GREY, -1: common.RED}).tolist()
    ax.hlines(places, shown["lower"], shown["upper"], colors=colours, linewidth=1.4)
    ax.scatter(shown["gain"], places, s=30, c=colours, zorder=2)
    for (column, name), mark in zip(others.items(), "sD^v", strict=False):
        ax.plot(shown[column], places, mark, color=common.BLACK, mfc="none", mew=0.8, label=name)
    ax.axvline(0, color=common.BLACK, linewidth=0.8)
    _rows(ax, list(table.index), label)
    if others:
        ax.legend(**common.BESIDE)


def before_after(ax: Axes, table: pd.DataFrame, before: str, after: str, *, by: str, label: str) -> None:
    """Two columns of a table beside each other, by name: hollow before, filled after, a line a row, first on top.

    The table has a row for each seed and value of `by`; rows of a name lie close together.
    """
    common.check_columns(table, by, before, after)
    names = []
    for place, (name, look, rows) in enumerate(common.groups(table, by)):
        at = place + np.linspace(-0.25, 0.25, len(rows) + 2)[1:-1]
        ax.hlines(at, rows[before], rows[after], color=look["color"], linewidth=0.8)
        ax.plot(rows[before], at, "o", color=look["color"], mfc="white", markersize=4)
        ax.plot(rows[after], at, "o", color=look["color"], markersize=4)
        names.append(name)
    _rows(ax, names, label)


def against(ax: Axes, table: pd.DataFrame, x: str, y: str, *, by: str = "method") -> None:
    """`y` against `x`: a dot a row, a colour for each of `by`."""
    common.check_columns(table, x, y, by)
    for name, look, rows in common.groups(common.scaled(table, x, y), by):
        ax.plot(rows[x], rows[y], look["marker"], color=look["color"], label=name)
    ax.set(xlabel=common.axis_label(x), ylabel=common.axis_label(y))


def embedding(
    ax: Axes,
    points: pd.DataFrame,
    agreement: pd.DataFrame,
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
    under the next one. Raises ValueError for one model or more than six, and for an `agreement` without their pairs.
    """

    common.check_columns(points, "model", "class", "example", "x", "y")
    common.check_columns(agreement, "first", "second", "class", *measures)
    for measure in measures:
        checks.choice("measures", measure, MEASURES)
    models, classes = list(dict.fromkeys(points["model"])), sorted(set(points["class"]))
    if len(models) < 2 or len(models) > len(MARKS):
        raise ValueError(f"points: {len(models)} models; give 2 to {len(MARKS)}, to be compared")
    shared: Any = agreement[agreement["class"] == "all"].set_index(["first", "second"])
    pairs = [(a, b) for i, a in enumerate(models) for b in models[i + 1 :]]
    if missing := [pair for pair in pairs if pair not in shared.index]:
        raise ValueError(f"agreement: it says nothing of {missing[0]}; pass that of the same embedding")
    if joined:
        for _, way in points.groupby(["class", "example"], sort=False):
            ax.plot(way["x"], way["y"], color=common.GREY, **common.THIN)
    label: dict[Any, Any] = {c: names[c] if names else f"class {c}" for c in classes}
    hue, order = ("model", models) if len(classes) == 1 else ("class", label.values())
    sns.scatterplot(points.assign(**{"class": points["class"].map(label.get)}), x="x", y="y", hue=hue, style="model",
                    palette=common.categories(order), markers=dict(zip(models, MARKS, strict=False)), s=14, alpha=0.7,
                    linewidth=0, ax=ax)  # fmt: skip
    entries = [e for e in zip(*ax.get_legend_handles_labels(), strict=True) if e[1] not in ("class", "model")]
    ax.legend(*zip(*entries, strict=True), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=6, handletextpad=0.1,
              columnspacing=1)  # fmt: skip
    numbers = [", ".join(f"{MEASURES[m]} {shared.loc[pair, m]:.2f}" for m in measures) for pair in pairs]
    if len(pairs) > 1:
        numbers = [f"{a} – {b}: {text}" for (a, b), text in zip(pairs, numbers, strict=True)]
    ax.set_title("\n".join([title, *numbers] if title else numbers), fontsize=8)
    ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
    ax.grid(False)


def _rows(ax: Axes, names: Sequence[Any], label: str) -> None:
    """Names the rows of a comparison, first on top, and its axis."""
    ax.set_yticks(range(len(names)), [str(name) for name in names])
    ax.yaxis.set_inverted(True)
    ax.grid(False, axis="y")
    ax.set(xlabel=label, ylabel="")


def _images(x: np.ndarray) -> np.ndarray:
    """(N, C, H, W), bytes or floats, to (N, H, W, 1 or 3) from 0 to 1."""
    images = (x if x.shape[1] in (1, 3) else x[:, :1]).transpose(0, 2, 3, 1)
    low, high = (0, 255) if x.dtype == np.uint8 else (images.min(), images.max())
    return (images - low) / (high - low or 1)

"""Lines: along a path through weight space, along a knob, along a run and from task to task.

One idea carries most of them: a long table, a column for x, one for y, one that names the lines, and seeds. A seed is a
thin line, the mean over seeds a thick one. Numbers are drawn as they are, but under a label that says "(%)" in percent.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from clkit import checks
from clkit.landscape import Curve
from clkit.plotting import common


def lines(
    ax: Axes, table: pd.DataFrame, x: str, y: str, *, by: str = "method", label: str | None = None, **look: Any
) -> None:
    """Draws `y` against `x`: a thin line a seed, where there are several, and their mean, a colour for each of `by`.

    The table has a row, or more, for each seed and value of `x`; without a column seed it is one seed. `label` is that
    of the y axis. `look` overrides matplotlib's properties of the means. Raises KeyError for a column that is missing.
    A legend is added by `legend`.
    """

    common.check_columns(table, x, y)
    label = label or common.axis_label(y)
    table = table.assign(**{y: common.factor(label) * table[y], "seed": table["seed"] if "seed" in table else 0})
    for name, own, rows in common.groups(table, by):
        drawn: Any = {"x": x, "y": y, "legend": False, "ax": ax}
        seeds = rows.groupby(["seed", x], as_index=False)[y].mean()
        if seeds["seed"].nunique() > 1:
            sns.lineplot(seeds, units="seed", estimator=None, color=own["color"], **drawn, **common.THIN)
        sns.lineplot(seeds, errorbar=None, label=name, **drawn, **own | look)
    ax.set(xlabel=common.axis_label(x), ylabel=label)


def alpha_sweep(
    axes: Iterable[Axes],
    table: pd.DataFrame,
    *,
    values: Sequence[str] = ("acc", "last", "forgetting"),
    along: str = "alpha",
    ends: tuple[str, ...] | None = None,
) -> None:
    """One panel for each of `values` against `along`, as `lines` draws them; the legend stands beside the last one.

    `ends` names the networks at 0 and 1: by default the new and the old one for alpha and beta, and none for others.
    Pass ("old", "new") for HCMM's alpha, and () for no ends. Raises ValueError unless there are as many axes as values.
    """
    panels = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(panels) != len(values):
        raise ValueError(f"axes: {len(panels)} for {len(values)} values {tuple(values)}; give one for each")
    common.check_columns(table, *values, along, "seed")
    ends = ("new", "old") if ends is None and along in ("alpha", "beta") else ends
    for ax, value in zip(panels, values, strict=True):
        lines(ax, table, along, value)
        if ends:
            _ends(ax, sorted(table[along].dropna().unique()), ends)
    common.legend(panels[-1])


def along_layers(
    ax: Axes,
    table: pd.DataFrame,
    value: str = "ratio",
    *,
    by: str = "variant",
    label: str = "variance left",
    level: float | None = 1.0,
) -> None:
    """Draws `value` layer by layer, as `lines` does, with the layers in the order of the table.

    For `representation.variance_ratio` and `collapse`, and any table with the columns layer, `by` and `value`. A dotted
    line is at `level`.
    """
    common.check_columns(table, "layer", by, value)
    layers = list(dict.fromkeys(table["layer"]))
    lines(ax, table.assign(layer=table["layer"].map(layers.index)), "layer", value, by=by, label=label)
    if level is not None:
        ax.axhline(level, color=common.BLACK, linestyle=":", linewidth=1)
    ax.set_xticks(range(len(layers)), layers)
    ax.set_xlabel("")
    common.legend(ax)


def courses(ax: Axes, table: pd.DataFrame, value: str, *, label: str) -> None:
    """How `value` goes from task to task, a colour for each method: the mean over the rows of lists, one entry a task.

    The table has the column `value` and, if there are several, method. `label` is that of the y axis.
    """
    common.check_columns(table, value)
    long = table.assign(task=[list(range(1, len(course) + 1)) for course in table[value]]).explode([value, "task"])
    long = long.astype({value: float, "task": int}).drop(columns="seed", errors="ignore")
    lines(ax, long, "task", value, label=label, marker="", linewidth=1.4)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("tasks learned")


def interpolation(
    ax: Axes,
    curves: Mapping[str, Curve | Sequence[Curve]] | Curve | Sequence[Curve],
    *,
    value: str = "accuracy",
    ends: tuple[str, str] = ("new", "old"),
    label: str = common.LABELS["alpha"],
) -> None:
    """Draws accuracy (or `value="loss"`) against the position on a path through weight space.

    Curves under names are means over tasks, a colour for each name; curves without a name are drawn task by task, the
    first task darkest. A sequence of curves is one curve a seed. `ends` name the networks at 0 and 1; alpha of CLeWI
    and beta of SFA weight the old one. Raises ValueError for no curves, and where their positions differ.
    """

    checks.choice("value", value, ("accuracy", "loss"))
    rows = []
    for name, given in (curves if isinstance(curves, Mapping) else {"": curves}).items():
        seeds = list(given) if isinstance(given, Sequence) else [given]
        if not seeds or any(not np.array_equal(c.ts, seeds[0].ts) for c in seeds):
            raise ValueError("curves: the seeds of one name need one curve each, all at the same positions ts")
        for seed, curve in enumerate(seeds):
            for task, ys in enumerate(getattr(curve, value).T):
                rows.append({"method": name or f"task {task + 1}", "seed": seed, "t": curve.ts, value: ys})
    table = pd.DataFrame(rows).explode(["t", value]).astype({"t": float, value: float})
    lines(ax, table, "t", value, marker="", linestyle="-")
    _ends(ax, [0, 0.25, 0.5, 0.75, 1], ends)
    ax.set(xlim=(0, 1), xlabel=label)
    common.legend(ax)


def tradeoff(ax: Axes, table: pd.DataFrame) -> None:
    """Forgetting against plasticity while alpha grows: a thin line a seed, their mean thick, points labelled.

    The table has a row for each seed and value of alpha, with the columns seed, plasticity, forgetting, alpha, and
    method if there are several. It is a `frontier` with seeds instead of standard errors.
    """
    common.check_columns(table, "plasticity", "forgetting", "alpha", "seed")
    table = table if "method" in table else table.assign(method="mean over seeds")
    names, values = dict.fromkeys(table["method"], "alpha"), sorted(table["alpha"].unique())
    marked = dict.fromkeys(names, values)
    frontier(ax, table, names, x="plasticity", y="forgetting", by="method", marked=marked, seeds=True)


def frontier(
    ax: Axes,
    table: pd.DataFrame,
    along: Mapping[str, str],
    *,
    x: str = "new",
    y: str = "old",
    by: str = "kind",
    marked: Mapping[str, Sequence[float]] = {},
    seeds: bool = False,
) -> None:
    """One plane for all methods: `y` against `x`, a line for each kind of method along the knob that `along` names.

    The table has a row for each seed and setting, with the columns seed, `by`, `x`, `y` and the knobs. Points are means
    over seeds; a kind whose knob is "" is one point. Bars are standard errors, which never leave the range of shares;
    with `seeds` a thin line a seed stands for them. `marked` names kinds and the values of the knob to write beside
    their points. Up is stable, right is plastic: where less is better, as of forgetting, an axis runs backwards.
    """
    common.check_columns(table, by, x, y, "seed", *(knob for knob in along.values() if knob))
    table = common.scaled(table, x, y)
    for name, look in common.looks(along).items():
        rows: Any = table[table[by] == name]
        means = rows.groupby(along[name] or by)[[x, y]]
        mean, error = means.mean(), means.sem()
        own: Any = {} if seeds else {"xerr": error[x], "yerr": error[y]}
        own |= look if along[name] else look | {"linestyle": "none", "marker": "D"}
        for _, one in rows.sort_values(along[name] or by).groupby("seed") if seeds else ():
            ax.plot(one[x], one[y], color=look["color"], **common.THIN)
        ax.errorbar(mean[x], mean[y], label=name, linewidth=1.5, elinewidth=0.6, **own)
        for i, value in enumerate(marked.get(name, ())):
            text = f"{value:g}" if i else f"{common.LETTERS.get(along[name], along[name])} = {value:g}"
            place = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
            ax.annotate(text, mean.loc[value], color=look["color"], **place)
    for axis, column in ((ax.xaxis, x), (ax.yaxis, y)):
        less = column in common.LESS_IS_MORE
        axis.set_label_text(common.axis_label(column) + (", less is better" if less else ""))
        axis.set_inverted(less)
    common.legend(ax)


def stages(
    ax: Axes, matrix: ArrayLike, names: Sequence[str], *, flat: ArrayLike | None = None, legend: bool = False
) -> None:
    """Accuracy on every task from the stage on in which it is learned, a colour for each, in percent.

    `matrix` (T, T) has row t after learning task t. `flat`, another one, is dotted in the same colours.
    """
    for k, (name, colour) in enumerate(common.categories(names).items()):
        stage = range(k + 1, len(names) + 1)
        ax.plot(stage, 100 * np.asarray(matrix)[k:, k], "o-", color=colour, label=name, markersize=3.5)
        if flat is not None:
            ax.plot(stage, 100 * np.asarray(flat)[k:, k], ":", color=colour)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("tasks learned")
    if legend:
        ax.legend(**common.BESIDE)


def sawtooth(ax: Axes, table: pd.DataFrame, *, names: Sequence[str] | None = None) -> None:
    """Accuracy on every task along one run, jumps drawn upright: what a merge does to it, and what undoes that.

    The table is `Result.trajectory()`: learning, step, when, task, accuracy. `names` are those of the tasks. Merges are
    marked below; a dotted line is where the next task begins.
    """
    common.check_columns(table, "learning", "step", "when", "task", "accuracy")
    order = table["when"].map(["before", "step", "after"].index)
    walked: Any = table.assign(order=order).sort_values(["step", "order"], kind="stable")
    tasks = sorted(set(table["task"]))
    for task, colour in zip(tasks, common.shades(len(tasks)), strict=True):
        rows = walked[walked["task"] == task]
        label = names[task] if names else f"task {task + 1}"
        ax.plot(rows["step"], 100 * rows["accuracy"], color=colour, linewidth=1.4, label=label)
    merged = walked.loc[walked["when"] == "after", "step"].unique()
    if len(merged):
        ax.plot(merged, [0] * len(merged), "^", color=common.BLACK, markersize=4, label="merge", clip_on=False)
    for start in walked.groupby("learning")["step"].max().iloc[:-1]:
        ax.axvline(start, color=common.GREY, linestyle=":", linewidth=1)
    ax.set(ylim=(0, 102), xlabel="optimizer step", ylabel=common.LABELS["accuracy"])
    common.legend(ax)


def spectra(ax: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    """Correlations of the units of one network with their partners in another, largest first, a colour for each name.

    The tables are those of `representation.matched`: dashed, unit i with unit i; broad, after the best matching.
    """
    kinds: Any = {"matched": {"linewidth": 4.0, "alpha": 0.45}, "as they are": {"linewidth": 1.5, "linestyle": "--"}}
    for name, colour in common.colours(tables).items():
        common.check_columns(tables[name], "kind", "rank", "correlation")
        for kind, line in kinds.items():
            rows = tables[name][tables[name]["kind"] == kind]
            at = 100 * (rows["rank"] + 0.5) / len(rows)
            ax.plot(at, rows["correlation"], label=f"{name}, {kind}", color=colour, **line)
    ax.set(ylim=(None, 1.05), xlabel="units, by correlation (%)", ylabel="correlation with the partner")
    common.legend(ax)


def _ends(ax: Axes, at: ArrayLike, names: Sequence[str]) -> None:
    """Ticks at most eight of the positions, and says below the outer ones which network lies there, or beyond."""
    at = np.unique(np.asarray(at)[np.linspace(0, np.size(at) - 1, 8).round().astype(int)])
    labels = [f"{value:g}" for value in at]
    labels[0] += f"\n{'' if at[0] == 0 else '← '}{names[0]}"
    labels[-1] += f"\n{names[1]}{'' if at[-1] == 1 else ' →'}"
    ax.set_xticks(at, labels)

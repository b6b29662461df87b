"""Lines: along a path through weight space, along a knob, along a run and from task to task."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from clkit.plotting.common import by_method, check_columns, legend, one_of, scaled, shades, thin_and_mean
from clkit.plotting.style import BLACK, GREY, LABELS, PALETTE, THIN, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from clkit.landscape import Curve


def interpolation(
    ax: "Axes",
    curves: "Mapping[str, Curve | Sequence[Curve]]",
    *,
    value: str = "accuracy",
    ends: tuple[str, str] = ("new", "old"),
    label: str = LABELS["alpha"],
) -> None:
    """Accuracy (or `value="loss"`) averaged over tasks against the position on a path, a colour for each name.

    A sequence of curves under one name is one curve a seed, all at the same positions: thin lines and their mean.
    `ends` name the networks at 0 and 1; alpha of CLeWI and beta of SFA weight the old one.
    """
    one_of("value", value, ("accuracy", "loss"))
    for name, colour in colours(curves).items():
        seeds = _seeds(curves[name])
        lines = [scaled(value, getattr(c, value)).mean(1) for c in seeds]
        thin_and_mean(ax, seeds[0].ts, lines, colour, name)
    _path_axis(ax, ends, label)
    ax.set_ylabel(LABELS[value])
    legend(ax)


def interpolation_by_task(
    ax: "Axes",
    curve: "Curve | Sequence[Curve]",
    *,
    value: str = "accuracy",
    ends: tuple[str, str] = ("new", "old"),
    label: str = LABELS["alpha"],
) -> None:
    """Accuracy (or `value="loss"`) on each task against the position on a path; the first task is the darkest."""
    one_of("value", value, ("accuracy", "loss"))
    seeds = _seeds(curve)
    for task, colour in enumerate(shades(seeds[0].accuracy.shape[1])):
        lines = [scaled(value, getattr(c, value))[:, task] for c in seeds]
        thin_and_mean(ax, seeds[0].ts, lines, colour, f"task {task + 1}")
    _path_axis(ax, ends, label)
    ax.set_ylabel(LABELS[value])
    legend(ax)


def tradeoff(
    ax: "Axes",
    table: "DataFrame",
    *,
    x: str = "plasticity",
    y: str = "forgetting",
    along: str = "alpha",
) -> None:
    """Stability against plasticity while `along` grows: a thin line a seed, their mean thick, points labelled.

    The table has a row for each seed and value of `along`, with the columns seed, `x`, `y`, `along`, and method if
    there are several. Forgetting points down, so that up is stable and right is plastic.
    """
    check_columns(table, x, y, along, "seed")
    for name, colour, rows in by_method(table):
        for _, one in rows.groupby("seed", sort=False):
            one = one.sort_values(along)
            ax.plot(scaled(x, one[x]), scaled(y, one[y]), color=colour, **THIN)
        mean = rows.groupby(along)[[x, y]].mean()
        ax.plot(scaled(x, mean[x]), scaled(y, mean[y]), "o-", color=colour, label=name)
        for at, px, py in zip(mean.index, scaled(x, mean[x]), scaled(y, mean[y]), strict=True):
            text = f"{'α' if along == 'alpha' else along} = {at:g}" if at == mean.index[0] else f"{at:g}"
            ax.annotate(text, (px, py), xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)
    ax.set_xlabel(LABELS.get(x, x))
    ax.set_ylabel(LABELS.get(y, y) + (", less is more stable" if y == "forgetting" else ""))
    if y == "forgetting" and not ax.yaxis_inverted():
        ax.invert_yaxis()
    legend(ax)


def alpha_sweep(
    axes: Iterable["Axes"],
    table: "DataFrame",
    *,
    values: Sequence[str] = ("acc", "last", "forgetting"),
    along: str = "alpha",
) -> None:
    """One panel for each of `values` against `along`: a thin line a seed, their mean thick, a colour for each method.

    The table has a row for each seed and value of `along`, with the columns seed, `along`, `values`, and method if
    there are several.
    """
    panels = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(panels) != len(values):
        raise ValueError(f"axes: {len(panels)} for {len(values)} values {tuple(values)}; give one for each")
    check_columns(table, *values, along, "seed")
    for ax, value in zip(panels, values, strict=True):
        for name, colour, rows in by_method(table):
            grid = rows.pivot_table(index=along, columns="seed", values=value)
            thin_and_mean(ax, grid.index, list(scaled(value, grid).to_numpy().T), colour, name, marker="o")
        ax.set_xlabel(LABELS.get(along, along))
        ax.set_ylabel(LABELS.get(value, value))
    legend(panels[0])


def sawtooth(ax: "Axes", table: "DataFrame", *, names: Sequence[str] | None = None, ticks: bool = True) -> None:
    """Accuracy on every task along one run, jumps drawn upright: what a merge does to it, and what undoes that.

    The table is `Result.trajectory()`: learning, step, when, task, accuracy. `names` are those of the tasks. Merges are
    marked below; a dotted line is where the next task begins.
    """
    check_columns(table, "learning", "step", "when", "task", "accuracy")
    tasks = sorted(set(table["task"]))
    order = [("before", "step", "after").index(when) for when in table["when"]]
    walked: Any = table.assign(order=order).sort_values(["step", "order"], kind="stable")
    for task, colour in zip(tasks, shades(len(tasks)), strict=True):
        rows = walked[walked["task"] == task]
        label = names[task] if names else f"task {task + 1}"
        ax.plot(rows["step"], 100 * rows["accuracy"], color=colour, linewidth=1.4, label=label)
    merged = walked.loc[walked["when"] == "after", "step"].unique()
    if ticks and len(merged):
        ax.plot(merged, [0] * len(merged), "^", color=BLACK, markersize=4, label="merge", clip_on=False)
    for start in walked.groupby("learning")["step"].max().iloc[:-1]:
        ax.axvline(start, color=GREY, linestyle=":", linewidth=1)
    ax.set_ylim(0, 102)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(LABELS["accuracy"])
    legend(ax)


def frontier(
    ax: "Axes",
    table: "DataFrame",
    along: Mapping[str, str],
    *,
    x: str = "new",
    y: str = "old",
    by: str = "kind",
    marked: Mapping[str, Sequence[float]] = {},
) -> None:
    """One plane for all methods: `y` against `x`, a line for each kind of method along the knob that `along` names.

    The table has a row for each seed and setting, with the columns seed, `by`, `x`, `y` and the knobs. Points are means
    over seeds, bars their standard errors; a kind whose knob is "" is one point. Up is stable, right is plastic.
    `marked` names kinds and the values of the knob to write beside their points.
    """
    knobs = [knob for knob in along.values() if knob]
    check_columns(table, by, x, y, "seed", *knobs)
    for name, colour in colours(along).items():
        rows, knob = table[table[by] == name], along[name]
        groups: Any = rows.groupby(knob if knob else by)[[x, y]]
        mean, error = 100 * groups.mean(), 100 * groups.sem()
        mark = "-o" if knob else "D"
        ax.errorbar(mean[x], mean[y], xerr=error[x], yerr=error[y], fmt=mark, color=colour, label=name,
                    linewidth=1.3, markersize=3.5, elinewidth=0.6)  # fmt: skip
        for value in marked.get(name, ()):
            at = (mean[x][value], mean[y][value])
            ax.annotate(f"{value:g}", at, xytext=(4, 3), textcoords="offset points", fontsize=7, color=colour)
    ax.set_xlabel(LABELS.get(x, x))
    ax.set_ylabel(LABELS.get(y, y))
    legend(ax)


def bits_frontier(
    ax: "Axes",
    table: "DataFrame",
    along: Mapping[str, str],
    *,
    x: str = "new_bits",
    y: str = "old_bits",
    by: str = "line",
    marked: Mapping[str, Sequence[float]] = {},
) -> None:
    """`frontier` in bits per byte, where less is better: both axes run backwards, so up is stable and right plastic."""
    frontier(ax, table.assign(**{x: table[x] / 100, y: table[y] / 100}), along, x=x, y=y, by=by, marked=marked)
    ax.set(xlabel="bits per byte on the newest domain", ylabel="bits per byte on earlier domains")
    ax.xaxis.set_inverted(True)
    ax.yaxis.set_inverted(True)


def courses(ax: "Axes", table: "DataFrame", value: str, *, label: str, scale: float = 100.0) -> None:
    """How `value` goes from task to task, a colour for each method: the mean over the rows of lists, one entry a task.

    The table has the columns method and `value`; entries are multiplied by `scale`, by default to percent.
    """
    check_columns(table, "method", value)
    for name, colour, rows in by_method(table):
        mean = scale * np.mean(rows[value].tolist(), axis=0)
        ax.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=1.4, label=name)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("tasks learned")
    ax.set_ylabel(label)


def stages(
    ax: "Axes", matrix: ArrayLike, names: Sequence[str], *, flat: ArrayLike | None = None, legend: bool = False
) -> None:
    """Accuracy on every task from the stage on in which it is learned, a colour for each, in percent.

    `matrix` (T, T) has row t after learning task t. `flat`, another one, is dotted in the same colours.
    """
    for style, rows in (("o-", np.asarray(matrix)), (":", flat)):
        if rows is None:
            continue
        for k, (name, colour) in enumerate(zip(names, PALETTE, strict=False)):
            stage = range(k + 1, len(names) + 1)
            label = name if style == "o-" else None
            ax.plot(stage, 100 * np.asarray(rows)[k:, k], style, color=colour, label=label, markersize=3.5)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("tasks learned")
    if legend:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _seeds(curves: "Curve | Sequence[Curve]") -> "list[Curve]":
    seeds = list(curves) if isinstance(curves, Sequence) else [curves]
    if not seeds or any(not np.array_equal(c.ts, seeds[0].ts) for c in seeds):
        raise ValueError("curves: the seeds of one name need one curve each, all at the same positions ts")
    return seeds


def _path_axis(ax: "Axes", ends: tuple[str, str], label: str) -> None:
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], [f"0\n{ends[0]}", "0.25", "0.5", "0.75", f"1\n{ends[1]}"])
    ax.set_xlabel(label)

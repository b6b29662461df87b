"""Results drawn on matplotlib axes: f(ax, results, ...). Nothing is trained, measured or saved here.

Accuracies come in [0, 1] and are shown in percent. Seeds are thin lines or dots, their mean is thick. A method has its
colour wherever it appears (`COLOURS`). Draw inside `with style():`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from clkit.landscape import Curve, Plane

# Okabe and Ito's palette, which people with colour-vision deficiencies can tell apart, and three of Tol's.
BLACK, GREY, BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (
    "#000000", "#999999", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
WINE, OLIVE, INDIGO = "#882255", "#999933", "#332288"
PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, WINE, OLIVE, INDIGO, GREY, YELLOW)

COLOURS: Mapping[str, str] = {
    "fine-tuning": GREY,
    "joint": BLACK,
    "ER": SKY,
    "CLeWI": BLUE,
    "ER + CLeWI": BLUE,
    "SFA": "#00734F",
    "AWM": PURPLE,
    "HCMM": RED,
    "WiSE-FT": ORANGE,
    "memory only": "#E3DACD",
    "ER-ACE": "#117777",
    "A-GEM": "#DDCC77",
    "GEM": "#1B4D3E",
    "MIR": "#99DDFF",
    "DER": "#6A5ACD",
    "DER++": INDIGO,
    "GDumb": "#B07A45",
    "iCaRL": "#AA4499",
    "BiC": "#CC3311",
    "L2": "#FFE135",
    "decoupled L2": "#C9A227",
    "data buffer": "#5E3C99",
    "EWC": OLIVE,
    "online EWC": "#A8E05F",
    "SI": "#F4A582",
    "MAS": "#663311",
    "LwF": WINE,
    "per task": "#7570B3",
    "class-incremental": "#BB5566",
    "domain-incremental": "#DDAA33",
    "task-incremental": "#004488",
    "average": "#BBBBBB",
    "task_arithmetic": ORANGE,
    "model_stock": "#7F5539",
    "ties": BLUE,
    "dare": SKY,
    "dare_ties": "#44AA99",
    "della": WINE,
    "pcb": INDIGO,
    "magmax": GREEN,
    "regmean": "#DDCC77",
    "iso_c": "#E377C2",
    "tsv": RED,
    "emr, masked": BLACK,
    "plain": GREY,
    "aligned": ORANGE,
    "plain, re-estimated": SKY,
    "aligned, re-estimated": BLUE,
}

LABELS: Mapping[str, str] = {
    "acc": "average accuracy (%)",
    "accuracy": "test accuracy (%)",
    "loss": "test loss",
    "last": "accuracy on the last task (%)",
    "forgetting": "forgetting (%)",
    "plasticity": "plasticity: accuracy just after learning (%)",
    "bwt": "backward transfer (%)",
    "fwt": "forward transfer (%)",
    "alpha": "α: weight of the old network",
    "strength": "strength of the pull",
    "old": "accuracy on earlier tasks (%)",
    "new": "accuracy on the newest task (%)",
    "beta": "β: weight of the old network",
    "p": "p: interval between merges, share of a task",
}

RC: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "lines.linewidth": 2.0,
    "lines.markersize": 4.5,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.6,
    "legend.fontsize": 8,
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "clkit",
}
THIN: Mapping[str, Any] = {"linewidth": 0.7, "alpha": 0.45}


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, for axes that are made inside."""
    import matplotlib as mpl

    with mpl.rc_context(RC):
        yield


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: its own if it has one, else the first of the palette that is still free here."""
    names = list(dict.fromkeys(names))
    taken = {COLOURS[name] for name in names if name in COLOURS}
    free = [c for c in PALETTE if c not in taken] or list(PALETTE)
    others = [name for name in names if name not in COLOURS]
    fresh = {name: free[i % len(free)] for i, name in enumerate(others)}
    return {name: COLOURS.get(name) or fresh[name] for name in names}


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
    _one_of("value", value, ("accuracy", "loss"))
    for name, colour in colours(curves).items():
        seeds = _seeds(curves[name])
        lines = [_scaled(value, getattr(c, value)).mean(1) for c in seeds]
        _thin_and_mean(ax, seeds[0].ts, lines, colour, name)
    _path_axis(ax, ends, label)
    ax.set_ylabel(LABELS[value])
    _legend(ax)


def interpolation_by_task(
    ax: "Axes",
    curve: "Curve | Sequence[Curve]",
    *,
    value: str = "accuracy",
    ends: tuple[str, str] = ("new", "old"),
    label: str = LABELS["alpha"],
) -> None:
    """Accuracy (or `value="loss"`) on each task against the position on a path; the first task is the darkest."""
    _one_of("value", value, ("accuracy", "loss"))
    seeds = _seeds(curve)
    for task, colour in enumerate(_shades(seeds[0].accuracy.shape[1])):
        lines = [_scaled(value, getattr(c, value))[:, task] for c in seeds]
        _thin_and_mean(ax, seeds[0].ts, lines, colour, f"task {task + 1}")
    _path_axis(ax, ends, label)
    ax.set_ylabel(LABELS[value])
    _legend(ax)


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
    _columns(table, x, y, along, "seed")
    for name, colour, rows in _by_method(table):
        for _, one in rows.groupby("seed", sort=False):
            one = one.sort_values(along)
            ax.plot(_scaled(x, one[x]), _scaled(y, one[y]), color=colour, **THIN)
        mean = rows.groupby(along)[[x, y]].mean()
        ax.plot(_scaled(x, mean[x]), _scaled(y, mean[y]), "o-", color=colour, label=name)
        for at, px, py in zip(mean.index, _scaled(x, mean[x]), _scaled(y, mean[y]), strict=True):
            text = f"{'α' if along == 'alpha' else along} = {at:g}" if at == mean.index[0] else f"{at:g}"
            ax.annotate(text, (px, py), xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)
    ax.set_xlabel(LABELS.get(x, x))
    ax.set_ylabel(LABELS.get(y, y) + (", less is more stable" if y == "forgetting" else ""))
    if y == "forgetting" and not ax.yaxis_inverted():
        ax.invert_yaxis()
    _legend(ax)


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
    _columns(table, *values, along, "seed")
    for ax, value in zip(panels, values, strict=True):
        for name, colour, rows in _by_method(table):
            grid = rows.pivot_table(index=along, columns="seed", values=value)
            _thin_and_mean(ax, grid.index, list(_scaled(value, grid).to_numpy().T), colour, name, marker="o")
        ax.set_xlabel(LABELS.get(along, along))
        ax.set_ylabel(LABELS.get(value, value))
    _legend(panels[0])


def bars(ax: "Axes", table: "DataFrame", value: str = "acc", *, by: str = "method", level: float = 0.95) -> None:
    """Compares methods: a bar to the mean over seeds, a dot a seed, and Student's `level` confidence interval.

    The table has a row for each seed of each method. Methods keep the order of the table, first on top. One seed
    gets no interval.
    """
    from scipy.stats import t as student

    _columns(table, by, value)
    names = list(dict.fromkeys(table[by]))
    for place, (name, colour) in enumerate(colours(names).items()):
        points = np.asarray(_scaled(value, table.loc[table[by] == name, value]), dtype=float)
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
    _columns(table, "gain", "lower", "upper", *others)
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


def sawtooth(ax: "Axes", table: "DataFrame", *, names: Sequence[str] | None = None, ticks: bool = True) -> None:
    """Accuracy on every task along one run, jumps drawn upright: what a merge does to it, and what undoes that.

    The table is `Result.trajectory()`: learning, step, when, task, accuracy. `names` are those of the tasks. Merges are
    marked below; a dotted line is where the next task begins.
    """
    _columns(table, "learning", "step", "when", "task", "accuracy")
    tasks = sorted(set(table["task"]))
    order = [("before", "step", "after").index(when) for when in table["when"]]
    walked: Any = table.assign(order=order).sort_values(["step", "order"], kind="stable")
    for task, colour in zip(tasks, _shades(len(tasks)), strict=True):
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
    _legend(ax)


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
    _columns(table, by, x, y, "seed", *knobs)
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
    _legend(ax)


def courses(ax: "Axes", table: "DataFrame", value: str, *, label: str, scale: float = 100.0) -> None:
    """How `value` goes from task to task, a colour for each method: the mean over the rows of lists, one entry a task.

    The table has the columns method and `value`; entries are multiplied by `scale`, by default to percent.
    """
    _columns(table, "method", value)
    for name, colour, rows in _by_method(table):
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


def examples_grid(ax: "Axes", stream: Any, columns: int = 10) -> None:
    """Training images as they are stored: a row for each task of the stream, its classes taking turns."""
    tiles = []
    for task in stream.tasks:
        labels = task.train.y.cpu().numpy()
        if task.train.x.ndim != 4:
            raise ValueError(f"stream: inputs of shape {stream.shape} are no images; only (C, H, W) can be shown")
        turns = [np.flatnonzero(labels == c)[i : i + 1] for i in range(columns) for c in task.classes]
        rows = np.concatenate(turns)[:columns]
        images = _images(task.train.x[rows.tolist()].cpu().numpy())
        tiles.append(np.concatenate([images, np.ones((columns - len(images), *images.shape[1:]))]))
    grid = np.pad(np.stack(tiles), [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], constant_values=1.0)
    tasks, _, height, width, channels = grid.shape
    sheet = grid.transpose(0, 2, 1, 3, 4).reshape(tasks * height, columns * width, channels)
    ax.imshow(sheet.squeeze(-1) if channels == 1 else sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_yticks(height * (np.arange(tasks) + 0.5), [_task_label(stream, task) for task in stream.tasks])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def plane(ax: "Axes", plane: "Plane", *, value: str = "accuracy", names: Sequence[str] = ("a", "b", "c")) -> None:
    """Contours of accuracy (or `value="loss"`) over a plane as `landscape.plane` gives it, its three corners named."""
    _one_of("value", value, ("accuracy", "loss"))
    shading = ax.contourf(plane.xs, plane.ys, _scaled(value, getattr(plane, value)), levels=15, cmap="viridis")
    ax.figure.colorbar(shading, ax=ax, label=LABELS[value], shrink=0.9)
    for (x, y), name in zip(plane.corners, names, strict=True):
        ax.plot(x, y, "o", color="white", markeredgecolor="black")
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        ax.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8, bbox=box)
    ax.set_aspect("equal")
    ax.grid(False)
    ax.set_xlabel("distance in weight space")


def _one_of(argument: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{argument}: {value!r} is unknown; choose one of {', '.join(known)}")


def _columns(table: "DataFrame", *wanted: str) -> None:
    missing = [name for name in wanted if name not in table]
    if missing:
        raise KeyError(f"table: it has no column {', '.join(missing)}, only {', '.join(map(str, table.columns))}")
    if not len(table):
        raise ValueError("table: it has no rows; run something first")


def _by_method(table: "DataFrame") -> Iterator[tuple[str, str, Any]]:
    if "method" not in table:
        yield "mean over seeds", BLUE, table
        return
    for name, colour in colours(table["method"]).items():
        yield name, colour, table[table["method"] == name]


def _seeds(curves: "Curve | Sequence[Curve]") -> "list[Curve]":
    seeds = list(curves) if isinstance(curves, Sequence) else [curves]
    if not seeds or any(not np.array_equal(c.ts, seeds[0].ts) for c in seeds):
        raise ValueError("curves: the seeds of one name need one curve each, all at the same positions ts")
    return seeds


def _scaled(value: str, numbers: Any) -> Any:
    """Shares become percent, losses stay."""
    return numbers if value == "loss" else 100 * numbers


def _thin_and_mean(ax: "Axes", x: Any, lines: list[np.ndarray], colour: Any, name: str, **mark: Any) -> None:
    if len(lines) > 1:
        for line in lines:
            ax.plot(x, line, color=colour, **THIN)
    ax.plot(x, np.mean(lines, 0), color=colour, label=name, **mark)


def _path_axis(ax: "Axes", ends: tuple[str, str], label: str) -> None:
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], [f"0\n{ends[0]}", "0.25", "0.5", "0.75", f"1\n{ends[1]}"])
    ax.set_xlabel(label)


def _legend(ax: "Axes") -> None:
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend()


def _shades(count: int) -> list[Any]:
    import matplotlib as mpl

    return [mpl.colormaps["viridis"](0.9 * i / max(count - 1, 1)) for i in range(count)]


def _images(x: np.ndarray) -> np.ndarray:
    """(N, C, H, W), bytes or floats, to (N, H, W, 1 or 3) from 0 to 1."""
    if x.shape[1] not in (1, 3):
        x = x[:, :1]
    if x.dtype == np.uint8:
        return x.transpose(0, 2, 3, 1) / 255
    low, high = x.min(), x.max()
    return (x.transpose(0, 2, 3, 1) - low) / (high - low or 1)


def _task_label(stream: Any, task: Any) -> str:
    names = [stream.classes[c] for c in task.classes]
    text = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"{task.index + 1}: {text}" if stream.scenario != "domain" else f"{task.index + 1}: {task.name}"


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

from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.colors
import numpy as np
import pandas as pd
import pytest
import torch

mpl.use("agg")
import matplotlib.pyplot as plt

from clkit import plotting
from clkit.data import Examples, Stream, Task
from clkit.learners import LEARNERS
from clkit.merging import MERGES

TS = np.linspace(0, 1, 5)


def curve(shift=0.0):
    accuracy = np.stack([TS, 1 - TS, TS**2], 1) * 0.5 + shift
    return SimpleNamespace(ts=TS, accuracy=accuracy, loss=1 - accuracy)


def table(methods=("CLeWI", "SFA"), seeds=3):
    rows = [
        {
            "method": m,
            "seed": s,
            "alpha": a,
            "acc": 0.5 + 0.1 * s,
            "last": 1 - a,
            "forgetting": 0.4 * a,
            "plasticity": a,
        }
        for m in methods
        for s in range(seeds)
        for a in (0.0, 0.3, 0.6)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def ax():
    with plotting.style():
        figure, ax = plt.subplots()
        yield ax
        figure.canvas.draw()  # layout problems surface here, and warnings are errors
    plt.close(figure)


def by_width(ax):
    thick = [line for line in ax.lines if line.get_linewidth() > 1]
    return thick, [line for line in ax.lines if line.get_linewidth() < 1]


def test_interpolation_shows_means_in_percent_and_names_the_ends(ax):
    plotting.interpolation(ax, {"plain": [curve(0.0), curve(0.2)], "aligned": curve(0.1)})
    thick, thin = by_width(ax)
    assert len(thick) == 2 and len(thin) == 2
    np.testing.assert_allclose(thick[0].get_ydata(), 100 * curve(0.1).accuracy.mean(1))
    np.testing.assert_allclose(thin[1].get_ydata(), 100 * curve(0.2).accuracy.mean(1))
    ticks = [t.get_text() for t in ax.get_xticklabels()]
    assert ticks[0] == "0\nnew" and ticks[-1] == "1\nold"
    assert "α" in ax.get_xlabel() and "old" in ax.get_xlabel() and "%" in ax.get_ylabel()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["plain", "aligned"]
    assert thick[0].get_color() == plotting.COLOURS["plain"]


def test_losses_stay_as_they_are(ax):
    plotting.interpolation(ax, {"plain": curve()}, value="loss", ends=("a", "b"), label="t")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), curve().loss.mean(1))
    assert ax.get_xlabel() == "t" and ax.get_legend() is None


def test_a_path_without_a_name_has_a_line_a_task(ax):
    plotting.interpolation(ax, [curve(0.0), curve(0.2)])
    thick, thin = by_width(ax)
    assert len(thick) == 3 and len(thin) == 6
    np.testing.assert_allclose(thick[1].get_ydata(), 100 * curve(0.1).accuracy[:, 1])
    assert len({str(line.get_color()) for line in thick}) == 3


def test_accuracy_matrix_writes_what_was_learned(ax):
    matrix = np.arange(9).reshape(3, 3) / 10
    plotting.accuracy_matrix(ax, matrix, names=["x", "y", "z"])
    assert [t.get_text() for t in ax.texts] == ["0", "30", "40", "60", "70", "80"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["x", "y", "z"] and ax.yaxis_inverted()
    assert ax.collections[0].get_array().mask.sum() == 3


def test_a_whole_accuracy_matrix_leaves_nothing_blank(ax):
    plotting.accuracy_matrix(ax, np.arange(9).reshape(3, 3) / 10, whole=True)
    assert [t.get_text() for t in ax.texts] == [str(10 * i) for i in range(9)]
    assert not np.ma.getmaskarray(ax.collections[0].get_array()).any()


def test_large_accuracy_matrices_have_a_colour_bar_instead(ax):
    plotting.accuracy_matrix(ax, np.zeros((20, 20)))
    assert not ax.texts and len(ax.figure.axes) == 2


def test_tradeoff_labels_points_and_points_up_to_stability(ax):
    plotting.tradeoff(ax, table())
    thick, thin = by_width(ax)
    assert len(thick) == 2 and len(thin) == 6
    assert [t.get_text() for t in ax.texts] == ["α = 0", "0.3", "0.6"] * 2
    assert thick[0].get_color() == plotting.COLOURS["CLeWI"]
    np.testing.assert_allclose(thick[0].get_xydata(), [[0, 0], [30, 12], [60, 24]])
    assert ax.yaxis_inverted()
    plotting.tradeoff(ax, table())
    assert ax.yaxis_inverted()


def test_alpha_sweep_has_a_panel_a_value():
    with plotting.style():
        figure, axes = plt.subplots(1, 3)
        plotting.alpha_sweep(axes, table(methods=["CLeWI"]).drop(columns="method"))
        figure.canvas.draw()
    thick, thin = by_width(axes[1])
    assert len(thick) == 1 and len(thin) == 3
    np.testing.assert_allclose(thick[0].get_ydata(), [100, 70, 40])
    ticks = [t.get_text() for t in axes[1].get_xticklabels()]
    assert ticks == ["0\nnew", "0.3", "0.6\nold →"]
    plotting.alpha_sweep(axes[:1], table(), values=["acc"], ends=("old", "new"))
    assert axes[0].get_xticklabels()[0].get_text() == "0\nold"
    with pytest.raises(ValueError, match="axes: 3 for 1 values"):
        plotting.alpha_sweep(axes, table(), values=["acc"])
    plt.close(figure)


def intervals(ax):
    """The ends of the black intervals, by their rows."""
    black = [line for line in ax.lines if mpl.colors.same_color(line.get_color(), "black") and line.get_marker() != "o"]
    found = [np.asarray(line.get_xydata()) for line in black]
    return {round(float(np.nanmedian(xy[:, 1]))): (np.nanmin(xy[:, 0]), np.nanmax(xy[:, 0])) for xy in found
            if np.isfinite(xy[:, 0]).any()}  # fmt: skip


@pytest.mark.parametrize("filled", [True, False])
def test_bars_reach_to_the_mean_with_students_interval(ax, filled):
    runs = pd.DataFrame({"method": ["ER"] * 3 + ["L2"], "acc": [0.5, 0.55, 0.6, 0.9]})
    plotting.bars(ax, runs, filled=filled)
    if filled:
        np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [55, 90])
        assert all(bar.get_x() == 0 for bar in ax.patches) and ax.get_xlim()[0] == 0
    dots = [line for line in ax.lines if line.get_marker() == "o" and line.get_markersize() < 5]
    assert [len(d.get_xdata()) for d in dots] == [3, 1]
    ((low, high),) = intervals(ax).values()  # one seed has none
    assert (high - low) / 2 == pytest.approx(4.303 * 5 / 3**0.5, rel=1e-3)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["ER", "L2"] and ax.yaxis_inverted()


def test_intervals_of_shares_stay_between_0_and_1(ax):
    plotting.bars(ax, pd.DataFrame({"method": ["a", "a", "b", "b"], "acc": [0.1, 0.4, 0.9, 1.0]}))
    ends = intervals(ax)
    assert ends[0][0] == 0 and ends[1][1] == 100 and ends[0][1] <= 100 and ends[1][0] > 0


def test_intervals_of_differences_may_be_negative(ax):
    plotting.bars(ax, pd.DataFrame({"method": ["a", "a"], "bwt": [-0.1, -0.2]}), "bwt")
    assert intervals(ax)[0][0] < -70


def test_bars_of_losses_are_no_percentages(ax):
    plotting.bars(ax, pd.DataFrame({"method": ["a", "b"], "loss": [1.5, 2.5]}), "loss")
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [1.5, 2.5])


def test_bars_of_a_kind_may_share_a_colour(ax):
    runs = pd.DataFrame({"method": ["ER", "mine", "joint"], "acc": [0.5, 0.6, 0.7]})
    plotting.bars(ax, runs, shades={"ER": plotting.RED, "mine": plotting.RED})
    faces = [mpl.colors.to_hex(bar.get_facecolor()).upper() for bar in ax.patches]
    assert faces == [plotting.RED, plotting.RED, plotting.COLOURS["joint"]]


def test_variants_in_bars_have_the_colour_of_their_method(ax):
    names = ["SFA p=0.1", "SFA p=1", "L2 λ=1", "mine, once", "mine, twice"]
    plotting.bars(ax, pd.DataFrame({"method": names, "acc": 0.5}))
    faces = [mpl.colors.to_hex(bar.get_facecolor()).upper() for bar in ax.patches]
    mine = plotting.colours(["SFA", "L2", "mine"])["mine"]
    assert faces == [*2 * [plotting.COLOURS["SFA"]], plotting.COLOURS["L2"], mine, mine]


def test_gains_say_by_colour_what_the_interval_tells(ax):
    rows = [[0.1, 0.05, 0.15, 0.2], [0.01, -0.02, 0.04, 0.0], [-0.1, -0.15, -0.05, np.nan]]
    table = pd.DataFrame(rows, ["up", "open", "down"], ["gain", "lower", "upper", "theirs"])
    plotting.gains(ax, table, {"theirs": "published"})
    whiskers, dots = ax.collections
    colours = [mpl.colors.to_hex(c).upper() for c in dots.get_facecolors()]
    assert colours == [plotting.BLUE, plotting.GREY, plotting.RED]
    np.testing.assert_allclose(dots.get_offsets(), [[10, 0], [1, 1], [-10, 2]])
    np.testing.assert_allclose(whiskers.get_segments()[1][:, 0], [-2, 4])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["published"]
    assert [t.get_text() for t in ax.get_yticklabels()] == list(table.index) and ax.yaxis_inverted()


def test_a_legend_stands_beside_the_axes_and_may_name_what_others_show(ax):
    plotting.legend(ax)
    assert ax.get_legend() is None
    other = ax.figure.add_subplot(1, 2, 2)
    for name in ("a", "b"):
        other.plot([0, 1], [0, 1], label=name)
    plotting.legend(ax, of=other)
    ax.figure.canvas.draw()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


@pytest.mark.parametrize(("channels", "dtype"), [(1, torch.uint8), (3, torch.uint8), (1, torch.float32)])
def test_examples_grid_has_a_row_a_task(ax, channels, dtype):
    def part(i, rows):
        x = torch.full((rows, channels, 4, 6), 40 * (i + 1)).to(dtype)
        x[:, :, 0] = 0
        return Examples(x, torch.arange(rows) % 2 + 2 * i)

    tasks = tuple(Task(i, f"t{i}", (2 * i, 2 * i + 1), part(i, 5 - 2 * i), part(i, 2)) for i in range(2))
    plotting.examples_grid(ax, Stream("toy", tasks, tuple("abcd")), columns=4)
    sheet = ax.images[0].get_array()
    assert sheet.shape[:2] == (2 * (4 + 2), 4 * (6 + 2))
    assert sheet[7, 30].min() == 1 and sheet[1, 30].min() == 0  # the second task has 3 examples, the rest is blank
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1: a, b", "2: c, d"]


def test_plane_marks_its_corners(ax):
    grid = np.outer(TS, TS)
    made = SimpleNamespace(xs=TS, ys=TS, loss=grid, accuracy=grid, corners=np.array([[0, 0], [1, 0], [0.5, 1]]))
    plotting.plane(ax, made, names=("new", "old", "aligned"))
    assert [t.get_text() for t in ax.texts] == ["new", "old", "aligned"] and len(ax.lines) == 3


def trajectory():
    rows = []
    for step, when, old, new in [
        (2, "step", 0.9, 0.1),
        (4, "before", 0.6, 0.8),
        (4, "after", 0.8, 0.7),
        (6, "step", 0.7, 0.9),
    ]:
        for task, accuracy in enumerate((old, new)):
            rows.append({"learning": step > 2, "step": step, "when": when, "task": task, "accuracy": accuracy})
    return pd.DataFrame(rows)


def test_sawtooth_jumps_upright_at_a_merge(ax):
    plotting.sawtooth(ax, trajectory().sample(frac=1, random_state=0), names=["even", "odd"])
    old, new, merges, boundary = ax.lines
    assert np.allclose(old.get_xydata(), [[2, 90], [4, 60], [4, 80], [6, 70]])
    assert np.allclose(new.get_ydata(), [10, 80, 70, 90]) and list(merges.get_xdata()) == [4]
    assert list(boundary.get_xdata()) == [2, 2]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["even", "odd", "merge"]


def test_a_frontier_is_a_line_a_kind_along_its_knob(ax):
    rows = [
        {"kind": kind, "seed": seed, "beta": b, "new": 0.9 - b / 2 + seed / 100, "old": 0.5 + b / 2}
        for kind, bs in (("SFA", (0.5, 0.1, 0.3)), ("fine-tuning", (float("nan"),)))
        for b in bs
        for seed in (0, 1)
    ]
    table = pd.DataFrame(rows).fillna({"new": 0.9, "old": 0.5})
    plotting.frontier(ax, table, {"SFA": "beta", "fine-tuning": ""}, marked={"SFA": [0.3]})
    line, point = (c.lines[0] for c in ax.containers)
    assert np.allclose(line.get_xydata(), [[85.5, 55], [75.5, 65], [65.5, 75]]) and len(point.get_xdata()) == 1
    assert line.get_color() == plotting.COLOURS["SFA"] and [t.get_text() for t in ax.texts] == ["β = 0.3"]


def test_errors_of_a_frontier_stay_within_what_accuracies_can_be(ax):
    rows = pd.DataFrame({"kind": "SFA", "seed": range(4), "beta": 0.1, "new": [1, 1, 1, 0.2], "old": [0, 0, 0, 0.6]})
    plotting.frontier(ax, rows, {"SFA": "beta"})
    across, up = (c.get_segments()[0] for c in ax.containers[0].lines[2])
    np.testing.assert_allclose([across[:, 0], up[:, 1]], [[60, 100], [0, 30]], atol=1e-9)


def test_courses_are_means_of_lists(ax):
    table = pd.DataFrame({"method": ["SFA", "SFA", "L2"], "first": [[1.0, 0.5], [0.8, 0.3], [0.9, 0.1]]})
    plotting.courses(ax, table, "first", label="first task (%)")
    assert [list(np.round(line.get_ydata(), 6)) for line in ax.lines] == [[90, 40], [90, 10]]
    assert ax.lines[0].get_color() == plotting.COLOURS["SFA"] and list(ax.lines[0].get_xdata()) == [1, 2]


def test_stages_begin_where_a_task_is_learned(ax):
    matrix = [[0.9, 0.1], [0.5, 0.8]]
    plotting.stages(ax, matrix, ["a", "b"], flat=[[0.7, 0], [0.7, 0.6]], legend=True)
    drawn = [(line.get_linestyle(), list(line.get_xdata()), list(np.round(line.get_ydata(), 6))) for line in ax.lines]
    assert sorted(drawn) == [("-", [1, 2], [90, 50]), ("-", [2], [80]), (":", [1, 2], [70, 70]), (":", [2], [60])]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]


def test_colours_are_kept_and_never_shared():
    names = ["one", "CLeWI", "two", "ER", "one"]
    found = plotting.colours(names)
    assert list(found) == ["one", "CLeWI", "two", "ER"] and len(set(found.values())) == 4
    assert found["CLeWI"] == plotting.COLOURS["CLeWI"]
    assert len(plotting.colours(map(str, range(20)))) == 20
    alike = plotting.colours(["TIES, sequential", "ordinary", "ordinary + linear", "average", "fine-tuning", "CLeWI"])
    assert len(set(alike.values())) == 6 and alike["ordinary"] == plotting.COLOURS["ordinary"]


def test_a_new_method_has_the_same_colour_in_every_figure():
    alone = plotting.colours(["mine"])["mine"]
    assert plotting.colours(["ER-ACE", "mine", "another"])["mine"] == alone in plotting.PALETTE
    taken = [name for name, colour in plotting.COLOURS.items() if colour == alone]
    assert not taken or plotting.colours([taken[0], "mine"])["mine"] != alone


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("SFA p=0.25 β=0.5, uniform", "SFA"),
        ("WiSE-FT (p = 1)", "WiSE-FT"),
        ("wise_ft", "WiSE-FT"),
        ("ties", "TIES"),
        ("task_arithmetic", "task arithmetic"),
        ("DER++ + CLeWI", "DER++"),
        ("ER-ACE, twice", "ER-ACE"),
        ("emr, masked", "EMR"),
        ("online EWC λ=3", "online EWC"),
        ("mask, published rate", "mask"),
        ("β = 0.3", "β"),
        ("cosine -0.1", "cosine"),
    ],
)
def test_variants_belong_to_their_method(name, method):
    assert plotting.family(name) == method
    if method in plotting.COLOURS:
        assert plotting.colours([name, "L2"])[name] == plotting.COLOURS[method]


def test_variants_of_a_method_are_darker_dashed_and_marked():
    looks = plotting.looks(["SFA p=1", "L2", "SFA", "SFA p=0.1"])
    own, first, second = (looks[name] for name in ("SFA", "SFA p=1", "SFA p=0.1"))
    assert own["color"] == plotting.COLOURS["SFA"]
    assert contrast(own["color"]) < contrast(first["color"]) < contrast(second["color"])
    for part in ("linestyle", "marker"):
        assert len({look[part] for look in (own, first, second)}) == 3


def test_settings_without_a_method_go_from_dark_to_light(ax):
    rows = pd.DataFrame({"beta": [0.5, 0.1, 0.3, 0.5, 0.1, 0.3], "p": 3 * [0] + 3 * [1], "acc": 0.5})
    plotting.lines(ax, rows, "p", "acc", by="beta")
    drawn = {line.get_label(): contrast(line.get_color()) for line in ax.lines}
    assert list(drawn) == ["β = 0.1", "β = 0.3", "β = 0.5"] and list(drawn.values()) == sorted(drawn.values())[::-1]


def test_lines_need_no_seeds_and_skip_what_is_missing(ax):
    rows = pd.DataFrame({"method": ["ER", "ER", "ER"], "at": [1, 2, 3], "acc": [0.1, np.nan, 0.3]})
    plotting.lines(ax, rows, "at", "acc")
    assert [list(np.round(line.get_xydata().T, 6).tolist()) for line in ax.lines] == [[[1, 3], [10, 30]]]


def contrast(colour):
    """The contrast on white, from 1 to 21: WCAG 2.1's relative luminances."""
    rgb = np.asarray(mpl.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)


def test_all_colours_are_seen_on_white():
    assert contrast("white") == pytest.approx(1) and contrast("black") == pytest.approx(21)
    found = {*plotting.COLOURS.values(), *plotting.PALETTE, *plotting.shades(2), *plotting.shades(9)}
    assert {colour: contrast(colour) for colour in found if contrast(colour) < 3} == {}


GROUPS = [["fine-tuning", "joint", "ER", "CLeWI"], ["CLeWI", "SFA", "AWM", "HCMM", "WiSE-FT"]]
GROUPS.append(["plain", "aligned", "plain, re-estimated", "aligned, re-estimated"])
GROUPS.append(["fine-tuning", "joint", "ER", "EWC", "LwF", "iCaRL", "DER++"])
GROUPS.append(["ER", "ER-ACE", "A-GEM", "GEM", "MIR", "DER", "DER++"])
GROUPS.append(["fine-tuning", "joint", "L2", "EWC", "online EWC", "SI", "MAS", "LwF"])
GROUPS.append(["fine-tuning", "joint", "SFA", "L2", "EWC", "data buffer"])
GROUPS.append(["class-incremental", "domain-incremental", "task-incremental"])
GROUPS.append(["fine-tuning", "joint", "SFA", "WiSE-FT", "L2", "EWC", "buffer"])
GROUPS.append(["fine-tuning", "joint", "SFA", "online EWC", "TIES", "buffer"])
GROUPS.append(["ER", "CLeWI", "ER-ACE", "DER++", "iCaRL", "BiC"])
MERGED = ["average", "task arithmetic", "model stock", "TIES", "DARE", "MagMax", "RegMean", "TSV", "Iso-C", "EMR"]
GROUPS += [MERGED, ["TIES", "DARE", "DARE TIES", "DELLA", "PCB"]]
# Machado, Oliveira and Fernandes 2009, severity 1
DEFICIENCIES = {
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}


def lab(colour, matrix):
    rgb = np.asarray(mpl.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(matrix) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("names", GROUPS)
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_that_meet_are_told_apart_by_everyone(names, deficiency):
    seen = [lab(colour, DEFICIENCIES[deficiency]) for colour in plotting.colours(names).values()]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(apart) > 15


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_palette_is_told_apart_by_everyone(deficiency):
    seen = [lab(colour, DEFICIENCIES[deficiency]) for colour in plotting.PALETTE]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]) > 15


def test_every_merge_of_the_table_has_its_colour():
    assert set(MERGED) <= {plotting.family(name) for name in [*MERGES, "emr, masked"]}


def test_every_learning_rule_has_a_colour_of_its_own():
    colours = [plotting.COLOURS[name] for name in LEARNERS]
    assert len(set(colours)) == len(LEARNERS)


def test_style_is_left_behind():
    before = dict(mpl.rcParams)
    with plotting.style():
        assert mpl.rcParams["axes.spines.top"] is False
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda ax: plotting.interpolation(ax, {"plain": curve()}, value="los"), ValueError, "value: 'los'"),
        (lambda ax: plotting.interpolation(ax, {"plain": []}), ValueError, "curves"),
        (lambda ax: plotting.accuracy_matrix(ax, np.zeros((2, 3))), ValueError, "matrix"),
        (lambda ax: plotting.tradeoff(ax, table().drop(columns="seed")), KeyError, "no column seed"),
        (lambda ax: plotting.bars(ax, table().iloc[:0]), ValueError, "no rows"),
    ],
)
def test_bad_input_names_itself(ax, call, error, message):
    with pytest.raises(error, match=message):
        call(ax)


def clouds(models=("old", "new"), classes=(4, 7), examples=5):
    rng = np.random.default_rng(0)
    points = [
        {"model": m, "class": c, "example": e, "x": rng.normal(), "y": rng.normal()}
        for m in models
        for c in classes
        for e in range(examples)
    ]
    pairs = [(a, b) for i, a in enumerate(models) for b in models[i + 1 :]]
    agreement = [
        {"first": a, "second": b, "class": c, "examples": 5, "cka": 0.5 + i / 10, "l1": 1, "l2": 0.25, "cosine": 0.1}
        for i, (a, b) in enumerate(pairs)
        for c in ("all", *classes)
    ]
    return pd.DataFrame(points), pd.DataFrame(agreement)


def dots(ax):
    """The dots of a scatter plot: their places, colours and shapes, as many as dots, shapes numbered as they come."""
    (spots,) = ax.collections
    shapes = [path.vertices.tobytes() for path in spots.get_paths()]
    numbers = {shape: i for i, shape in enumerate(dict.fromkeys(shapes))}
    colours = [mpl.colors.to_hex(c).upper() for c in spots.get_facecolors()]
    return np.asarray(spots.get_offsets()), colours, [numbers[shape] for shape in shapes]


def test_an_embedding_has_a_marker_a_model_a_colour_a_class_and_its_numbers(ax):
    points, agreement = clouds()
    plotting.embedding(ax, points, agreement, title="t-SNE", names="abcdefgh")
    places, colours, shapes = dots(ax)
    one, other = plotting.PALETTE[:2]
    assert colours == 2 * (5 * [one] + 5 * [other]) and shapes == 10 * [0] + 10 * [1]
    np.testing.assert_array_equal(places[10:15, 0], points.x[10:15])
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"old", "new", "e", "h"}
    assert ax.get_title() == "t-SNE\nCKA 0.50, mean distance 0.25"


def test_an_embedding_of_one_class_colours_models_and_writes_all_pairs(ax):
    points, agreement = clouds(("old", "new", "merged"), classes=(3,))
    plotting.embedding(ax, points, agreement, measures=["cka"], joined=True)
    _, colours, shapes = dots(ax)
    assert shapes == 5 * [0] + 5 * [1] + 5 * [2] and len(set(colours)) == 3
    ways = [line for line in ax.lines if len(line.get_xdata())]
    assert len(ways) == 5 and list(ways[1].get_xdata()) == list(points.x[points.example == 1])
    assert ax.get_title() == "old – new: CKA 0.50\nold – merged: CKA 0.60\nnew – merged: CKA 0.70"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["old", "new", "merged"]


def test_an_embedding_draws_more_classes_than_the_palette_has_colours(ax):
    plotting.embedding(ax, *clouds(classes=range(15), examples=2))
    assert len(dots(ax)[0]) == 60 and len(set(dots(ax)[1])) == len(plotting.PALETTE)


def test_a_heat_map_writes_its_numbers(ax):
    table = pd.DataFrame([[1.0, 0.5], [0.25, 0.75], [0.0, 0.1]], index=["in", "mid", "out"], columns=["a", "b"])
    plotting.heatmap(ax, table)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["in", "mid", "out"]
    assert [t.get_text() for t in ax.texts] == ["1.00", "0.50", "0.25", "0.75", "0.00", "0.10"]
    assert len(ax.figure.axes) == 1


def test_a_large_heat_map_has_a_colour_bar_instead(ax):
    plotting.heatmap(ax, pd.DataFrame(np.zeros((9, 9))), label="CKA")
    assert not ax.texts and ax.figure.axes[1].get_ylabel() == "CKA"


def test_layers_keep_their_order_and_seeds_are_thin(ax):
    rows = [
        {"layer": layer, "variant": v, "seed": s, "ratio": 0.1 * i + s + 0.5 * (v == "aligned")}
        for s in (0, 1)
        for i, layer in enumerate(("norm2", "norm10", "linear"))
        for v in ("plain", "aligned")
    ]
    plotting.along_layers(ax, pd.DataFrame(rows))
    thick, thin = by_width(ax)
    plain, aligned, level = [*thick, *[line for line in ax.lines if line.get_linewidth() == 1]]
    np.testing.assert_allclose(plain.get_ydata(), [0.5, 0.6, 0.7])
    np.testing.assert_allclose(aligned.get_ydata(), [1.0, 1.1, 1.2])
    assert len(thin) == 4 and list(level.get_ydata()) == [1, 1]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["norm2", "norm10", "linear"]
    assert aligned.get_color() == plotting.COLOURS["aligned"]


def test_layers_need_no_seeds(ax):
    plotting.along_layers(ax, pd.DataFrame({"layer": ["a", "b"], "variant": "merged", "ratio": [1, 0.5]}), level=None)
    assert len(ax.lines) == 1 and list(ax.lines[0].get_ydata()) == [1, 0.5] and ax.get_legend() is None


def test_spectra_show_both_kinds_of_partners(ax):
    table = pd.DataFrame(
        {"kind": ["as they are"] * 2 + ["matched"] * 2, "rank": [0, 1] * 2, "correlation": [0.2, -0.1, 0.9, 0.8]}
    )
    plotting.spectra(ax, {"independent": table})
    matched, as_they_are = ax.lines
    assert list(matched.get_ydata()) == [0.9, 0.8] and list(as_they_are.get_ydata()) == [0.2, -0.1]
    assert list(matched.get_xdata()) == [25, 75] and as_they_are.get_linestyle() == "--"


def test_before_is_hollow_and_after_filled(ax):
    rows = pd.DataFrame({"by": ["weak", "weak", "strong"], "b": [1.0, 2.0, 3.0], "a": [0.9, 1.8, 0.5]})
    plotting.before_after(ax, rows, "b", "a", by="by", label="mismatch")
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    filled = [line for line in ax.lines if line.get_markerfacecolor() != "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[1, 2], [3]]
    assert [list(line.get_xdata()) for line in filled] == [[0.9, 1.8], [0.5]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["weak", "strong"] and ax.yaxis_inverted()
    assert hollow[0].get_ydata()[0] < hollow[0].get_ydata()[1] < 0.5 < hollow[1].get_ydata()[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda ax, p, a: plotting.embedding(ax, p, a[a["first"] == "none"]), ValueError, "no rows"),
        (lambda ax, p, a: plotting.embedding(ax, p, a[a["class"] != "all"]), ValueError, "agreement: .*'old', 'new'"),
        (lambda ax, p, a: plotting.embedding(ax, p, a, measures=["r2"]), KeyError, "no column r2"),
        (lambda ax, p, a: plotting.embedding(ax, p, a, measures=["examples"]), ValueError, "measures: 'examples'"),
        (lambda ax, p, a: plotting.embedding(ax, p[p.model == "old"], a), ValueError, "points: 1 models"),
        (lambda ax, p, a: plotting.along_layers(ax, a), KeyError, "no column layer"),
        (lambda ax, p, a: plotting.spectra(ax, {"x": a}), KeyError, "no column kind"),
        (lambda ax, p, a: plotting.before_after(ax, a, "b", "l1", by="class", label=""), KeyError, "no column b"),
    ],
)
def test_bad_features_name_themselves(ax, call, error, message):
    with pytest.raises(error, match=message):
        call(ax, *clouds())


def test_dots_lie_one_against_the_other(ax):
    rows = pd.DataFrame({"method": ["ER", "SFA", "ER"], "l2": [0.1, 0.2, 0.3], "forgetting": [0.4, 0.5, 0.6]})
    plotting.against(ax, rows, "l2", "forgetting")
    assert [list(line.get_xdata()) for line in ax.lines] == [[0.1, 0.3], [0.2]]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [40, 60])
    assert ax.lines[1].get_color() == plotting.COLOURS["SFA"]

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


def test_interpolation_by_task_has_a_line_a_task(ax):
    plotting.interpolation_by_task(ax, [curve(0.0), curve(0.2)])
    thick, thin = by_width(ax)
    assert len(thick) == 3 and len(thin) == 6
    np.testing.assert_allclose(thick[1].get_ydata(), 100 * curve(0.1).accuracy[:, 1])
    assert len({str(line.get_color()) for line in thick}) == 3


def test_accuracy_matrix_writes_what_was_learned(ax):
    matrix = np.arange(9).reshape(3, 3) / 10
    plotting.accuracy_matrix(ax, matrix, names=["x", "y", "z"])
    assert [t.get_text() for t in ax.texts] == ["0", "30", "40", "60", "70", "80"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["x", "y", "z"]
    assert ax.images[0].get_array().mask.sum() == 3


def test_a_whole_accuracy_matrix_leaves_nothing_blank(ax):
    plotting.accuracy_matrix(ax, np.arange(9).reshape(3, 3) / 10, whole=True)
    assert [t.get_text() for t in ax.texts] == [str(10 * i) for i in range(9)]
    assert not np.ma.getmaskarray(ax.images[0].get_array()).any()


def test_large_accuracy_matrices_have_a_colour_bar_instead(ax):
    plotting.accuracy_matrix(ax, np.zeros((20, 20)))
    assert not ax.texts and len(ax.figure.axes) == 2


def test_tradeoff_labels_points_and_points_up_to_stability(ax):
    plotting.tradeoff(ax, table())
    thick, thin = by_width(ax)
    assert len(thick) == 2 and len(thin) == 6
    assert [t.get_text() for t in ax.texts] == ["α = 0", "0.3", "0.6"] * 2
    np.testing.assert_allclose(thick[0].get_xdata(), [0, 30, 60])
    np.testing.assert_allclose(thick[0].get_ydata(), [0, 12, 24])
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
    with pytest.raises(ValueError, match="axes: 3 for 1 values"):
        plotting.alpha_sweep(axes, table(), values=["acc"])
    plt.close(figure)


def test_bars_reach_to_the_mean_with_students_interval(ax):
    runs = pd.DataFrame({"method": ["ER"] * 3 + ["joint"], "acc": [0.5, 0.6, 0.7, 0.9]})
    plotting.bars(ax, runs)
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [60, 90])
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [len(d.get_xdata()) for d in dots] == [3, 1]
    (interval,) = [c for c in ax.containers if not hasattr(c, "patches")]
    low, high = interval[2][0].get_segments()[0][:, 0]
    assert (high - low) / 2 == pytest.approx(4.303 * 10 / 3**0.5, rel=1e-3)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["ER", "joint"]


def test_bars_of_a_kind_may_share_a_colour(ax):
    runs = pd.DataFrame({"method": ["ER", "mine", "joint"], "acc": [0.5, 0.6, 0.7]})
    plotting.bars(ax, runs, shades={"ER": plotting.RED, "mine": plotting.RED})
    faces = [mpl.colors.to_hex(bar.get_facecolor()).upper() for bar in ax.patches]
    assert faces == [plotting.RED, plotting.RED, plotting.COLOURS["joint"]]


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
    assert line.get_color() == plotting.COLOURS["SFA"] and [t.get_text() for t in ax.texts] == ["0.3"]


def test_courses_are_means_of_lists(ax):
    table = pd.DataFrame({"method": ["SFA", "SFA", "L2"], "first": [[1.0, 0.5], [0.8, 0.3], [0.9, 0.1]]})
    plotting.courses(ax, table, "first", label="first task (%)")
    assert [list(np.round(line.get_ydata(), 6)) for line in ax.lines] == [[90, 40], [90, 10]]
    assert ax.lines[0].get_color() == plotting.COLOURS["SFA"] and list(ax.lines[0].get_xdata()) == [1, 2]


def test_stages_begin_where_a_task_is_learned(ax):
    matrix = [[0.9, 0.1], [0.5, 0.8]]
    plotting.stages(ax, matrix, ["a", "b"], flat=[[0.7, 0], [0.7, 0.6]], legend=True)
    drawn = [(line.get_linestyle(), list(line.get_xdata()), list(np.round(line.get_ydata(), 6))) for line in ax.lines]
    assert drawn == [("-", [1, 2], [90, 50]), ("-", [2], [80]), (":", [1, 2], [70, 70]), (":", [2], [60])]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]


def test_colours_are_kept_and_never_shared():
    names = ["one", "CLeWI", "two", "ER", "one"]
    found = plotting.colours(names)
    assert list(found) == ["one", "CLeWI", "two", "ER"] and len(set(found.values())) == 4
    assert found["CLeWI"] == plotting.COLOURS["CLeWI"]
    assert len(plotting.colours(map(str, range(20)))) == 20


GROUPS = [["fine-tuning", "joint", "ER", "CLeWI"], ["CLeWI", "SFA", "AWM", "HCMM", "WiSE-FT"]]
GROUPS.append(["plain", "aligned", "plain, re-estimated", "aligned, re-estimated"])
GROUPS.append(["fine-tuning", "joint", "ER", "EWC", "LwF", "iCaRL", "DER++"])
GROUPS.append(["ER", "ER-ACE", "A-GEM", "GEM", "MIR", "DER", "DER++"])
GROUPS.append(["fine-tuning", "joint", "L2", "EWC", "online EWC", "SI", "MAS", "LwF"])
GROUPS.append(["fine-tuning", "joint", "SFA", "L2", "EWC", "data buffer"])
GROUPS.append(["class-incremental", "domain-incremental", "task-incremental"])
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
    seen = [lab(plotting.COLOURS[name], DEFICIENCIES[deficiency]) for name in names]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(apart) > 15


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


def shown(ax):
    return [line for line in ax.lines if len(line.get_xdata())]


def test_an_embedding_has_a_marker_a_model_a_colour_a_class_and_its_numbers(ax):
    points, agreement = clouds()
    plotting.embedding(ax, points, agreement, title="t-SNE", names="abcdefgh")
    drawn = [(line.get_marker(), line.get_color(), len(line.get_xdata())) for line in shown(ax)]
    one, other = plotting.PALETTE[:2]
    assert drawn == [("o", one, 5), ("o", other, 5), ("^", one, 5), ("^", other, 5)]
    np.testing.assert_array_equal(shown(ax)[2].get_xdata(), points.x[10:15])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["old", "new", "e", "h"]
    assert ax.get_title() == "t-SNE\nCKA 0.50, mean distance 0.25"


def test_an_embedding_of_one_class_colours_models_and_writes_all_pairs(ax):
    points, agreement = clouds(("old", "new", "merged"), classes=(3,))
    plotting.embedding(ax, points, agreement, measures=["cka"], joined=True)
    marks = [line for line in shown(ax) if line.get_marker() != "None"]
    assert [line.get_marker() for line in marks] == ["o", "^", "s"] and len({line.get_color() for line in marks}) == 3
    ways = [line for line in shown(ax) if line.get_marker() == "None"]
    assert len(ways) == 5 and list(ways[1].get_xdata()) == list(points.x[points.example == 1])
    assert ax.get_title() == "old – new: CKA 0.50\nold – merged: CKA 0.60\nnew – merged: CKA 0.70"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["old", "new", "merged"]


def test_similarities_begin_below_at_the_input(ax):
    table = pd.DataFrame([[1.0, 0.5], [0.25, 0.75], [0.0, 0.1]], index=["in", "mid", "out"], columns=["a", "b"])
    plotting.similarities(ax, table)
    assert ax.images[0].origin == "lower" and [t.get_text() for t in ax.get_yticklabels()] == ["in", "mid", "out"]
    assert [t.get_text() for t in ax.texts] == ["1.00", "0.50", "0.25", "0.75", "0.00", "0.10"]
    assert len(ax.figure.axes) == 1


def test_many_layers_have_a_colour_bar_instead(ax):
    plotting.similarities(ax, pd.DataFrame(np.zeros((9, 9))))
    assert not ax.texts and len(ax.figure.axes) == 2


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

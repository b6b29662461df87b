"""Statistics over tables, a notebook's page with its claims and files, and the execution of notebooks."""

import json
import math
from contextlib import suppress

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy.stats import ttest_1samp

from clkit.experiments import (
    Comparison,
    Difference,
    Method,
    contrasts,
    execute,
    find,
    page,
    paired_difference,
    repository,
    study,
    summarise,
)  # fmt: skip
from clkit.experiments.notebooks import WIDGET, normalise
from clkit.experiments.pages import COLUMNS, _narrow
from clkit.experiments.statistics import difference
from clkit.learners import ER
from clkit.training import Training


def table_of(gains, noise=0.0):
    """Methods a and b over seeds, with a ahead of b by `gains`."""
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, noise, len(gains))
    rows = [("b", seed, value) for seed, value in enumerate(base)]
    rows += [("a", seed, value + gain) for seed, (value, gain) in enumerate(zip(base, gains, strict=True))]
    return pd.DataFrame(rows, columns=["method", "seed", "acc"])


def test_summary_is_mean_interval_spread_and_count():
    table = pd.DataFrame({"method": ["b", "b", "a"], "acc": [0.2, 0.4, 0.5], "last": [0, 0, 1.0]})
    summary = summarise(table)
    assert list(summary) == ["method", "mean", "lower", "upper", "std", "n"]
    assert list(summary["method"]) == ["b", "a"] and list(summary["n"]) == [2, 1]
    assert summary["mean"].tolist() == pytest.approx([0.3, 0.5])
    assert summary["std"][0] == pytest.approx(np.sqrt(0.02)) and np.isnan(summary["std"][1])
    assert summarise(table, ["method", "acc"], "last")["mean"].tolist() == [0, 0, 1]
    assert summary[["mean", "lower", "upper"]].loc[0].tolist() == pytest.approx(difference([0.2, 0.4])[:3])
    assert summary[["lower", "upper"]].loc[1].isna().all()  # one row has no interval, and not one of width 0
    with pytest.raises(ValueError, match="lost"):
        summarise(table, value="lost")
    with pytest.raises(ValueError, match="level: 95"):
        summarise(table, level=95)


def test_rows_without_a_value_do_not_count_in_a_summary_and_groups_without_a_setting_do():
    table = pd.DataFrame({"alpha": [0.5, 0.5, 0.5, np.nan, np.nan, 1.0], "acc": [0.1, 0.3, np.nan, 0.2, 0.2, np.nan]})
    summary = summarise(table, "alpha")
    assert summary.n.tolist() == [2, 2, 0] and summary["mean"].tolist()[:2] == pytest.approx([0.2, 0.2])
    assert (summary.lower[1], summary.upper[1]) == (0.2, 0.2) and summary.loc[2, ["mean", "lower", "std"]].isna().all()
    whole = summarise(table, "alpha", level=0.5)
    assert summary.lower[0] < whole.lower[0] < 0.2 < whole.upper[0] < summary.upper[0]


gains = st.lists(st.floats(-1, 1), min_size=2, max_size=8)


@settings(max_examples=20, deadline=None)
@given(gains)
def test_difference_is_antisymmetric_and_holds_its_mean(values):
    table = table_of(values)
    ab, ba = (paired_difference(table, *pair) for pair in (("a", "b"), ("b", "a")))
    assert ab.n == len(values)
    assert ab.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert (-ba.mean, -ba.upper, -ba.lower) == pytest.approx((ab.mean, ab.lower, ab.upper), abs=1e-12)
    assert ba.verdict == {"gains": "loses", "loses": "gains", "open": "open"}[ab.verdict]
    assert ab.lower <= ab.mean + 1e-12 and ab.mean <= ab.upper + 1e-12
    assert paired_difference(table.sample(frac=1, random_state=1), "a", "b").mean == pytest.approx(ab.mean, abs=1e-12)


def test_pairing_cancels_what_the_pairs_share():
    assert paired_difference(table_of([0.1] * 5, noise=10.0), "a", "b") == pytest.approx((0.1, 0.1, 0.1, 5))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [difference(rng.normal(0.3, 1, 3), level=0.9) for _ in range(1000)]
    assert 0.87 <= np.mean([one.lower <= 0.3 <= one.upper for one in found]) <= 0.93


@pytest.mark.parametrize(
    ("lower", "upper", "verdict"), [(0.1, 0.3, "gains"), (-0.3, -0.1, "loses"), (-0.1, 0.2, "open")]
)
def test_verdict_is_the_side_of_zero_that_the_interval_lies_on(lower, upper, verdict):
    assert Difference((lower + upper) / 2, lower, upper, 3).verdict == verdict
    assert Difference(0.0, 0.0, 0.0, 3).verdict == "open"


def test_one_pair_has_no_interval():
    alone = paired_difference(table_of([0.25]), "a", "b")
    assert alone.mean == 0.25 and np.isnan(alone.lower) and np.isnan(alone.upper) and alone.verdict == "open"


def test_gaps_are_one_number_a_pair():
    for gaps in ([], [[0.1, 0.2]], 0.1):
        with pytest.raises(ValueError, match="one number for each pair"):
            difference(gaps)


@settings(max_examples=30, deadline=None)
@given(gains, st.floats(0.5, 0.99))
def test_interval_is_that_of_students_test(values, level):
    gaps = np.array(values) + 3 * np.arange(-1, len(values) - 1)  # never all alike
    found, test = difference(gaps, level), ttest_1samp(gaps, 0)
    assert (found.lower, found.upper) == pytest.approx(tuple(test.confidence_interval(level)), abs=1e-9)
    assert abs(test.pvalue - (1 - level)) < 1e-9 or (found.verdict == "open") == (test.pvalue > 1 - level)


def test_what_cannot_be_paired_is_refused():
    table = table_of([0.1, 0.2])
    with pytest.raises(ValueError, match="not paired at"):
        paired_difference(table[1:], "a", "b")
    with pytest.raises(ValueError, match="several rows"):
        paired_difference(pd.concat([table, table]), "a", "b")
    with pytest.raises(ValueError, match="it holds b, a"):
        paired_difference(table, "a", "c")
    with pytest.raises(ValueError, match="level"):
        paired_difference(table, "a", "b", level=95)
    assert paired_difference(table.assign(stream="s"), "a", "b", by=["stream", "seed"]).n == 2


def test_contrasts_are_paired_differences_a_row_a_pair():
    table = pd.concat([table_of([0.1, 0.2, 0.4]).assign(net=net, loss=1.0) for net in ("x", "y")])
    table.loc[(table.net == "y") & (table.method == "a"), "acc"] -= 1
    part = table[table.net == "x"]
    alone = contrasts(part, [("a", "b"), ("b", "a")])
    expected = paired_difference(part, "a", "b")
    assert tuple(alone.loc["a", "b"]) == (*expected, expected.verdict) and alone["mean"]["b", "a"] == -expected.mean
    assert list(alone.columns) == ["mean", "lower", "upper", "n", "verdict"] and list(alone.index.names) == ["a", "b"]
    named = contrasts(table, {"gain": ("a", "b")}, within=["net"])
    assert named.loc["x", "gain"].tolist() == alone.loc["a", "b"].tolist() and named.verdict["y", "gain"] == "loses"
    assert contrasts(part, {"same": ("a", "b")}, "loss")["mean"]["same"] == 0
    with pytest.raises(ValueError, match="several rows"):
        contrasts(table, {"gain": ("a", "b")})


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository of its own, as the working folder, with no profile chosen."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    for name in ("CLKIT_PROFILE", "CLKIT_FIGURES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def drawing() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [0.2, 0.4], label="x")
    return figure


def test_profile_comes_from_the_environment(place, monkeypatch):
    assert page("03-x").profile == "fast" and page("03-x", "paper").choose(fast=1, paper=2) == 2
    monkeypatch.setenv("CLKIT_PROFILE", "paper")
    assert page("03-x").profile == "paper" and page("03-x").root == place
    monkeypatch.setenv("CLKIT_PROFILE", "papers")
    with pytest.raises(ValueError, match="choose one of fast, real, paper"):
        page("03-x")
    with pytest.raises(ValueError, match="file name"):
        page("../x", "fast")


def test_repository_is_the_nearest_with_a_project(place, tmp_path_factory):
    assert repository() == repository(place / "notebooks" / "more") == place
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert repository(elsewhere) == elsewhere.resolve()


def test_outside_of_any_repository_figures_lie_beside_the_notebook(tmp_path_factory, place, monkeypatch):
    folder = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(folder)
    page("my-page").save(drawing(), "fig1")
    assert (folder / "figures" / "my-page-fig1.png").is_file()
    (folder / "figures" / "my-page-fig1.png").unlink()
    monkeypatch.chdir(place)
    write_notebook(folder / "01-good.ipynb", CELLS["01-good"])
    (found,) = find([str(folder / "01-good.ipynb")])
    (outcome,) = execute([found], progress=False)
    assert (outcome.figures, outcome.holds, outcome.error) == (1, 1, "")
    assert (folder / "figures" / "01-good-one.png").is_file() and not (place / "figures").exists()


def test_saved_files_are_complete_and_always_the_same(place):
    table = pd.DataFrame({"t": [0.0, 0.1], "acc": [1 / 3, np.nan]})
    seen = []
    for _ in range(2):
        page("03-x").save(drawing(), "fig1", table, config={"learner": ER(5), "alphas": (0.1,)}, seeds=range(2))
        seen.append({path.name: path.read_bytes() for path in (place / "figures").iterdir()})
    assert seen[0] == seen[1]
    assert set(seen[0]) == {f"03-x-fig1.{kind}" for kind in ("png", "svg", "csv", "json")}
    pd.testing.assert_frame_equal(pd.read_csv(place / "figures" / "03-x-fig1.csv"), table, check_exact=True)
    facts = json.loads(seen[0]["03-x-fig1.json"])
    assert facts["config"] == {"learner": repr(ER(5)), "alphas": [0.1]} and facts["seeds"] == [0, 1]
    assert facts["profile"] == "fast" and facts["data"] == "03-x-fig1.csv" and len(facts["hash"]) == 16
    page("03-x").save(drawing(), "fig3", table.assign(seed=[4, np.nan]), seeds=range(2))
    assert json.loads((place / "figures" / "03-x-fig3.json").read_text())["seeds"] == [4]
    page("03-x").save(drawing(), "fig2", {"curve": np.array([1.0, np.inf])})
    assert json.loads((place / "figures" / "03-x-fig2.json").read_text())["data"] == {"curve": [1.0, None]}


def test_figures_may_go_elsewhere(place, monkeypatch):
    monkeypatch.setenv("CLKIT_FIGURES", str(place / "out"))
    page("03-x").save(drawing(), "fig1")
    assert (place / "out" / "03-x-fig1.png").is_file() and not (place / "figures").exists()


@pytest.mark.parametrize("profile", ["fast", "paper"])
def test_results_are_computed_once_for_a_configuration(place, profile):
    calls = []

    def compute():
        calls.append(1)
        return pd.DataFrame({"a": [1, 2], "b": [0.1, np.nan], "c": ["x", "y"], "d": [[1.0], []]})

    first, again = (page("03-x", profile).results(compute, {"n": 1}, "grid") for _ in range(2))
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    pd.testing.assert_frame_equal(first, compute(), check_dtype=False)
    assert len(calls) == 2
    page("03-x", profile).results(compute, {"n": 2}, "grid")
    assert len(calls) == 3
    if profile == "fast":
        assert not (place / "figures").exists()


def test_a_table_is_run_once_and_read_with_its_settings(place):
    calls = []

    class Counted(Comparison):
        def run(self, **options):
            calls.append(1)
            rows = pd.DataFrame({"stream": "s", "model": "m", "training": "Training", "method": list(self.methods)})
            return self.complete(rows.assign(acc=[0.5, 0.6]))

    methods = {f"ER {m}": Method(ER(m)) for m in (5, 9)}
    whole = Counted({"s": lambda seed: None}, {"m": None}, methods, Training(), range(2))
    first, again = (page("03-x").table(whole, "main") for _ in range(2))
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert len(calls) == 1 and again.memory.tolist() == [5, 9] and again.columns[-1] == "memory"
    stored = json.loads((place / "figures" / "03-x-main-runs.json").read_text())
    assert stored["data"]["table"]["columns"] == ["stream", "model", "training", "method", "acc"]
    extra = page("03-x").table(whole, "more", lambda: whole.run().assign(more=1))
    assert extra.more.tolist() == [1, 1] and len(calls) == 2


def test_a_study_is_kept_as_it_is(place):
    def halved(seed, p):
        return {"half": seed / 2}

    made = study(halved, range(2), p=(0.1, 0.2))
    table = page("03-x").table(made, "halves")
    assert table.half.tolist() == [0, 0.5, 0, 0.5] and table.p.tolist() == [0.1, 0.1, 0.2, 0.2]
    pd.testing.assert_frame_equal(page("03-x").table(made, "halves"), table)
    assert json.loads((place / "figures" / "03-x-halves-runs.json").read_text())["config"] == {
        **made.config,
        "p": [0.1, 0.2],
    }


def test_a_real_table_is_computed_under_its_profile_alone_and_read_under_the_others(place, monkeypatch):
    def halved(seed, p):
        return {"half": seed / 2}

    made = study(halved, range(2), p=(0.1, 0.2))
    with pytest.raises(ValueError, match=r"03-x-main-real.json is not there; .* clkit figures --profile real 03-x"):
        page("03-x").real(made, "main")
    monkeypatch.delenv("CLKIT_DATA", raising=False)
    with pytest.raises(ValueError, match=r"CLKIT_DATA: .* is no folder"):
        page("03-x", "real").real(made, "main")
    monkeypatch.setenv("CLKIT_DATA", str(place))
    table = page("03-x", "real").real(made, "main")
    with pytest.raises(ValueError, match=r"03-x-main-real\.json holds stored results"):
        page("03-x").save(drawing(), "main-real")
    pd.testing.assert_frame_equal(page("03-x").real(made, "main"), table)
    pd.testing.assert_frame_equal(page("03-x", "paper").real(made, "main"), table)
    other = study(halved, range(3), p=(0.1, 0.2))
    with pytest.raises(ValueError, match="has another configuration"):
        page("03-x").real(other, "main")
    assert len(page("03-x", "real").real(other, "main")) == 6
    page("03-x", "real").table(made, "halves")
    assert {path.name for path in (place / "figures").iterdir()} == {"03-x-main-real.json", "03-x-halves-runs.json"}
    assert page("03-x", "real").choose(fast=1, paper=2) == 1


def test_results_that_were_cut_off_are_computed_again(place):
    opened = page("03-x", "paper")
    assert opened.results(lambda: {"x": 1}, 1) == {"x": 1}
    path = place / "figures" / "03-x-results-paper.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert opened.results(lambda: {"x": 2}, 1) == {"x": 2}


def small_page(profile=None, **parameters):
    """A page with all that a page can write, as a notebook's cells make it."""
    opened = page("03-x", profile, **parameters)
    table = pd.DataFrame({"seed": opened.parameters["SEEDS"], "acc": opened.parameters["SHARE"]})
    opened.save(drawing(), "fig1", table, seeds=opened.parameters["SEEDS"])
    opened.results(lambda: opened.parameters["SHARE"], {"share": opened.parameters["SHARE"]}, "found", commit=True)
    laws, checks = opened.laws(), opened.checks()
    laws.check("a share is a share", 0 <= opened.parameters["SHARE"] <= 1)
    laws.done()
    checks.check("three seeds", len(opened.parameters["SEEDS"]) == 3)
    checks.done()
    return opened


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


USUAL = {"SEEDS": [0, 1, 2], "SHARE": 0.5}


@pytest.mark.parametrize(
    "changed",
    [{"SEEDS": [7]}, {"SHARE": 0.1}, {"SEEDS": [0], "SHARE": 1.5}, {"SEEDS": (4, 5, 6, 7)}, {"SEEDS": np.arange(2)}],
    ids=str,
)
def test_changed_parameters_stop_nothing_and_overwrite_nothing(place, capsys, monkeypatch, changed):
    small_page(**USUAL)
    before = contents(place / "figures")
    assert capsys.readouterr().out == "laws: 1 of 1\nchecks: 1 of 1\n"
    other = small_page(**USUAL | changed)
    out = capsys.readouterr().out
    assert contents(place / "figures") == before
    assert other.figures.is_relative_to(place / "cache" / "pages") and str(other.figures) in out
    assert all(f"{name}: {value!r}, recorded {USUAL[name]!r}" in out for name, value in changed.items())
    assert ("1 of 1 wrong" in out) == ("SEEDS" in changed or changed["SHARE"] > 1)
    assert {"03-x-fig1.png", "03-x-fig1.csv", "03-x-claims.json"} <= contents(other.figures).keys()
    assert ("03-x-found.json" in contents(other.figures)) == ("SHARE" in changed)  # else it is read where it lies
    assert small_page(**USUAL).figures == place / "figures" and contents(place / "figures") == before
    monkeypatch.setenv("CLKIT_RECORD", "1")  # what `clkit figures --write` does
    with suppress(AssertionError):
        small_page(**USUAL | changed)
    monkeypatch.delenv("CLKIT_RECORD")
    assert page("03-x", **USUAL | changed).changed == [] and page("03-x", **USUAL).changed == list(changed)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"SEEDS": []}, USUAL),
        ({"SEEDS": 7}, USUAL),
        ({"SEEDS": ["a"]}, USUAL),
        ({"SEEDS": [0.0, 1.0, 2.0], "SHARE": "0.5"}, USUAL),
        ({"SEEDS": [0.5]}, USUAL),
        ({"SEEDS": range(3), "SHARE": None}, USUAL),
        ({"SHARE": 1}, USUAL | {"SHARE": 1.0}),
        ({"SEEDS": [5.0]}, USUAL | {"SEEDS": [5]}),
        ({"SEEDS": [7, 5, 7]}, USUAL | {"SEEDS": [7, 5]}),
        ({"SEEDS": [-1, 3], "SHARE": -0.5}, USUAL),
        ({"SEEDS": [3], "SHARE": 0}, USUAL | {"SEEDS": [3], "SHARE": 0.0}),
    ],
    ids=str,
)
def test_parameters_come_as_the_recorded_kind(place, capsys, given, taken):
    small_page(**USUAL)
    opened = page("03-x", **USUAL | given)
    assert opened.parameters == taken and list(opened.parameters) == list(USUAL)
    assert all(type(opened.parameters[name]) is type(USUAL[name]) for name in USUAL)
    assert opened.changed == [name for name in USUAL if taken[name] != USUAL[name]]
    unsaid = [name for name, value in given.items() if list(np.ravel(value)) != list(np.ravel(USUAL[name]))]
    out = capsys.readouterr().out
    assert all(f"{name}: {given[name]!r}" in out for name in unsaid)


def test_changed_parameters_keep_to_a_folder_that_was_asked_for(place, monkeypatch):
    small_page(**USUAL)
    monkeypatch.setenv("CLKIT_FIGURES", str(place / "out"))
    assert page("03-x", **USUAL | {"SHARE": 0.1}).figures == place / "out"
    monkeypatch.setenv("CLKIT_FIGURES", str(place / "notebooks" / ".." / "figures"))
    assert page("03-x", **USUAL | {"SHARE": 0.1}).figures.is_relative_to(place / "cache")
    assert page("03-x").changed == [] and page("04-y", **USUAL).changed == []


def test_in_the_paper_profile_checks_report_and_laws_still_hold(place, capsys):
    small_page(**USUAL)
    before = contents(place / "figures")
    opened = page("03-x", "paper", **USUAL)
    checks, laws = opened.checks(), opened.laws()
    checks.check("three seeds", False)
    checks.done()
    assert "checks: 1 of 1 wrong: 'three seeds'" in capsys.readouterr().out
    laws.check("a share is a share", False)
    with pytest.raises(AssertionError, match="a share is a share"):
        laws.done()
    assert before.items() <= contents(place / "figures").items()


def test_an_edited_notebook_runs_through_and_leaves_the_figures(notebooks):
    path, cell = notebooks / "03-x.ipynb", CELLS["01-good"]
    code = ["SEEDS = [0, 1]", cell[0].replace("'01-good'", "'03-x', SEEDS=SEEDS"), cell[2]]
    code += ["checks = page.checks(); checks.check('two', len(SEEDS) == 2); checks.done()"]
    recorded = page("03-x", SEEDS=[0, 1])
    recorded.save(drawing(), "one")
    recorded.checks().done()
    before = contents(notebooks.parent / "figures")
    write_notebook(path, ["SEEDS = [0, 1]", "SEEDS = [7]", *code[1:]])  # as papermill injects it
    (outcome,) = execute([path], progress=False)
    assert outcome.error == "" and contents(notebooks.parent / "figures") == before
    (outcome,) = execute([path], progress=False, write=True)
    assert outcome.error.startswith("AssertionError") and contents(notebooks.parent / "figures") != before


def test_an_exercise_is_right_or_not_yet(place, capsys):
    page("03-x").check("the first task is kept", np.bool_(True), "merge")
    page("03-x").check("the first task is kept", False, "merge")
    assert capsys.readouterr().out == "right: the first task is kept\nnot yet: the first task is kept; merge\n"


def test_a_prediction_is_compared_and_the_truth_is_told_only_then(capsys):
    for guess, found, words in ((None, 0.4, "not yet"), (0.3, 0.4, "right"), (1, np.float32(0.4), "not yet")):
        page("03-x").predict("the share", guess, found, within=0.11)
        out = capsys.readouterr().out
        assert out.startswith(f"{words}: the share") and ("0.4" in out) is (guess is not None)
    with pytest.raises(ValueError, match="guess: 'half'; give"):
        page("03-x").predict("the share", "half", 0.4, within=0.1)  # type: ignore[arg-type]
    for within in (math.inf, math.nan, 0.0, -0.1):  # every guess would be right, or none
        with pytest.raises(ValueError, match=r"within: .*; give a number, above 0"):
            page("03-x").predict("the share", None, 0.4, within=within)


@pytest.mark.parametrize("right", [len, lambda: False, (x > 1 for x in (0, 1)), "no", math.nan, np.float64("nan")])
def test_an_exercise_is_not_right_by_what_is_true_whatever_was_written(right):
    with pytest.raises(TypeError, match="counts as true whatever it says; give True or False"):
        page("03-x").check("it is so", right, "look again")


def test_checks_take_one_truth_value_each(place):
    checks = page("03-x").checks()
    for value in (np.array([True, True]), 1.0, None):
        with pytest.raises(TypeError, match="give True or False"):
            checks.check("x", value)
    checks.check("x", np.bool_(True))
    with pytest.raises(ValueError, match="twice"):
        checks.check("x", True)


def test_laws_and_checks_are_counted_and_kept_side_by_side(place, capsys):
    opened = page("03-x")
    laws, checks = opened.laws(), opened.checks()
    for text in ("the function is kept", "ends are the parents"):
        laws.check(text, True)
    laws.done()
    checks.check("the text says two", True)
    checks.done()
    assert capsys.readouterr().out == "laws: 2 of 2\nchecks: 1 of 1\n"
    written = json.loads((place / "figures" / "03-x-claims.json").read_text())
    assert len(written["laws"]) == 2 and written["checks"] == [{"text": "the text says two", "holds": True}]
    for lines in (laws, checks):
        lines.check("broken", False)
        with pytest.raises(AssertionError, match=r"1 of . wrong: 'broken'"):
            lines.done()


def test_show_displays_the_source(place, capsys):
    page("03-x").show(ER)
    assert "Markdown" in capsys.readouterr().out


def test_show_breaks_long_docstrings_and_leaves_code_as_it_is():
    code = f"    return {' + '.join(['value'] * 20)}"
    shown = _narrow(f'def f(value):\n    """{"words " * 30}end."""\n{code}\n').splitlines()
    assert shown[-1] == code and all(len(line) <= COLUMNS and line.startswith("    ") for line in shown[1:-1])
    assert " ".join(" ".join(shown[1:-1]).split()) == f'"""{"words " * 30}end."""'


CELLS = {
    "01-good": [
        "from clkit.experiments import page\npage = page('01-good')",
        "import sys; print('noise', file=sys.stderr)",
        "from matplotlib.figure import Figure\npage.save(Figure(), 'one', {'x': 1}); page.profile",
        "import pandas as pd; n = range(5)",
        "a, b = ([{'seed': s, 'method': m, 'acc': s % 3 + up} for s in n] for m, up in {'a': 0, 'b': 9}.items())",
        "for i, row in enumerate(b): row['acc'] += i / 9",
        "claims, rows = page.claims(), pd.DataFrame(a + b)",
        "claims.claim('gain', 'b gains', rows, ('b', 'a')); claims.claim('loss', 'a gains', rows, ('a', 'b'))",
        "claims.done()",
    ],
    "02-bad": ["1 / 0"],
}


def write_notebook(path, cells):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.cells[-1].metadata["tags"] = ["nbval-check-output"]
    nbformat.write(book, path)


@pytest.fixture
def notebooks(place, monkeypatch):
    """Two notebooks, a good and a bad one, and a kernel that keeps its files to itself."""
    monkeypatch.setenv("IPYTHONDIR", str(place / "ipython"))
    for name, cells in CELLS.items():
        write_notebook(place / "notebooks" / f"{name}.ipynb", cells)
    return place / "notebooks"


def test_notebooks_are_found_by_how_their_names_begin(notebooks):
    assert [path.stem for path in find()] == list(CELLS)
    assert find(["02"]) == find(["02-bad.ipynb", "notebooks/02-bad.ipynb"]) == [notebooks / "02-bad.ipynb"]
    with pytest.raises(ValueError, match="did you mean '01-good'"):
        find(["01-god"])


def test_execution_reports_figures_claims_and_errors(notebooks):
    before = {path: path.read_bytes() for path in notebooks.iterdir()}
    good, bad = execute(find(), progress=False, jobs=2)
    assert (good.notebook, good.figures, good.holds, good.does_not_hold, good.open, good.error) == (
        "01-good", 1, 1, 1, 0, "",
    )  # fmt: skip
    assert bad.error == "ZeroDivisionError: division by zero" and bad.figures == 0
    assert {path: path.read_bytes() for path in notebooks.iterdir()} == before


def test_written_outputs_are_always_the_same_and_are_checked(notebooks):
    path = notebooks / "03-plain.ipynb"
    write_notebook(path, ["import sys; print('noise', file=sys.stderr)", "2 + 3", "print('laws: 2 of 2')"])
    (unchecked,) = execute([path], progress=False, check=True)
    assert "cells [2] print other than what is stored" in unchecked.error
    execute([path], progress=False, write=True)
    written = path.read_bytes()
    book = nbformat.read(path, as_version=4)
    assert [len(cell.outputs) for cell in book.cells] == [0, 1, 1]
    assert all(cell.execution_count for cell in book.cells)
    (checked,) = execute([path], progress=False, check=True)
    assert checked.error == ""
    execute([path], progress=False, write=True)
    assert path.read_bytes() == written
    with pytest.raises(ValueError, match="check"):
        execute([path], check=True, write=True)


def test_progress_bars_and_widget_views_are_taken_out():
    def shown(text):
        return nbformat.v4.new_output("display_data", {"text/plain": text, WIDGET: {"model_id": "1"}})

    outputs = [shown("  0%|          | 0/4 [00:00<?, ?it/s]"), shown("task:  25%|##  | 1/4"), shown("Image(value=b'')")]
    cell = nbformat.v4.new_code_cell("x", outputs=outputs, metadata={"execution": {"iopub": "now"}})
    book = normalise(
        nbformat.v4.new_notebook(
            cells=[cell], metadata={"widgets": {}, "language_info": {"name": "python", "version": "3"}}
        )
    )
    assert [output.data for output in book.cells[0].outputs] == [{"text/plain": "Image(value=b'')"}]
    assert not book.cells[0].metadata and set(book.metadata) == {"kernelspec", "language_info"}
    nbformat.validate(book)

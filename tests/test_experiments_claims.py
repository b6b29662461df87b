"""Claims: verdicts from effects over seeds, what cannot fail and is refused, and what the notebooks have recorded."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from clkit.experiments import Claims, difference, page
from clkit.experiments.claims import MOST
from clkit.experiments.statistics import holm, p_value, verdict

RECORDS = sorted((Path(__file__).parents[1] / "figures").glob("*-claims.json"))
numbers = st.floats(-10, 10).map(lambda x: round(x, 3))
gaps = st.lists(numbers, min_size=2, max_size=12)
regions = st.one_of(
    numbers.map(lambda t: (t, math.inf)),
    numbers.map(lambda t: (-math.inf, t)),
    st.floats(0.01, 5).map(lambda m: (-m, m)),
)


def judged(values, region):
    return verdict(np.mean(values), p_value(values, *region), *region)


@given(gaps, regions)
def test_a_claim_holds_where_the_interval_lies_within_it_and_fails_where_it_lies_outside(values, region):
    _, lower, upper, _ = difference(values)
    assume(all(abs(end - edge) > 1e-6 for end in (lower, upper) for edge in region))
    within, outside = region[0] < lower and upper < region[1], upper < region[0] or lower > region[1]
    expected = "holds" if within else "does not hold" if outside else "open"
    assert judged(values, region) == ("open" if np.ptp(values) <= 1e-9 * np.abs(values).max() else expected)


@given(gaps, numbers)
def test_turning_the_signs_turns_the_verdict(values, threshold):
    mirrored = {"holds": "does not hold", "does not hold": "holds", "open": "open"}
    found, turned = judged(values, (0, math.inf)), judged([-v for v in values], (0, math.inf))
    assert turned == mirrored[found]
    assert judged([-v for v in values], (-math.inf, -threshold)) == judged(values, (threshold, math.inf))


@given(gaps, numbers)
def test_p_is_that_of_students_test(values, threshold):
    assume(np.ptp(values) > 1e-6)
    test: Any = ttest_1samp(values, threshold)
    assert p_value(values, threshold) == pytest.approx(test.pvalue, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("values", [[0.3], [0.2] * 5, [0.0] * 5, [0.3 - 0.1, 0.4 - 0.2, 0.2]], ids=str)
def test_what_has_no_spread_is_open(values):
    assert math.isnan(p_value(values)) and judged(values, (0, math.inf)) == "open"


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=12))
def test_holm_only_raises_p_and_keeps_the_order(p):
    found, tested = holm(p), np.isfinite(p)
    assert len(found) == len(p) and np.array_equal(np.isfinite(found), tested)
    kept, raised = np.array(p)[tested], found[tested]
    assert (raised >= kept).all() and (raised <= 1).all() and (raised <= kept * max(1, len(kept)) + 1e-12).all()
    assert (np.diff(raised[np.argsort(kept)]) >= 0).all()
    if len(kept):
        assert raised.min() == min(1, kept.min() * len(kept))


def test_holm_by_hand():
    assert holm([0.04, 0.01, math.nan, 0.03]).tolist() == pytest.approx([0.06, 0.03, math.nan, 0.06], nan_ok=True)


def rows_of(levels, seeds=5, noise=0.01, seed=0):
    """A row for each method and seed: its level, what the seed adds to all methods, and noise."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.05, seeds)
    found = [(s, m, base[s] + level + rng.normal(0, noise)) for s in range(seeds) for m, level in levels.items()]
    return pd.DataFrame(found, columns=["seed", "method", "acc"])


def rank_correlation(rows, x, y):
    return rows.groupby("seed").apply(lambda part: part[x].corr(part[y], method="spearman"), include_groups=False)


def gain_by_alone(rows):
    return -rank_correlation(rows.assign(gain=rows.pair - rows.alone), "alone", "gain")


def gain_by_spread(rows):
    return rank_correlation(rows.assign(gain=rows.pair - rows.alone), "spread", "gain")


def best_less_first(rows):
    return rows.groupby("seed").acc.max() - rows[rows.method == "a"].set_index("seed").acc


def chosen_on_others(rows):
    """The best method on the other seeds, less the first: what is chosen has not seen the seed it is judged on."""
    table = rows.pivot(index="seed", columns="method", values="acc")
    best = {seed: table.drop(index=seed).mean().idxmax() for seed in table.index}
    return {seed: table.loc[seed, name] - table.loc[seed, "a"] for seed, name in best.items()}


def pairs_of(seed, slope=0.0):
    """Fifteen learners a seed: accuracy alone, with merging, and a spread; the gain depends on that by the slope."""
    rng, index = (
        np.random.default_rng(seed),
        pd.MultiIndex.from_product([range(5), range(15)], names=["seed", "method"]),
    )
    alone, spread = rng.normal(0.5, 0.05, 75), rng.normal(0, 1, 75)
    pair = rng.normal(0.6, 0.05, 75) + slope * spread
    return pd.DataFrame({"alone": alone, "spread": spread, "pair": pair}, index).reset_index()


@pytest.fixture
def claims(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path / "cache"))
    for name in ("CLKIT_FIGURES", "CLKIT_PROFILE", "CLKIT_RECORD"):
        monkeypatch.delenv(name, raising=False)
    return page("03-x").claims()


LEVELS = {"a": 0.5, "b": 0.55, "c": 0.45, "d": 0.5}
FORCED = {
    "accuracy alone predicts the gain, which has it subtracted": (pairs_of(0), gain_by_alone, {"shuffle": "alone"}),
    "the best of a grid beats its first entry": (rows_of(dict.fromkeys("abcde", 0.5)), best_less_first, {}),
    "below a level that nothing reaches": (
        rows_of(dict.fromkeys("abc", 0.2)),
        lambda rows: rows[rows.method == "a"].set_index("seed").acc,
        {"below": 0.9},
    ),
    "alike, where all there are are": (rows_of(dict.fromkeys("abc", 0.5)), ("a", "b"), {"within_margin": 0.1}),
}


@pytest.mark.parametrize("name", FORCED)
def test_what_cannot_fail_is_refused(claims, capsys, name):
    rows, effect, options = FORCED[name]
    claims.claim("forced", name, rows, effect, **options)
    with pytest.raises(ValueError, match=r"'forced'.* claim more than chance gives"):
        claims.done()
    assert not list(claims.page.figures.glob("*")) and capsys.readouterr().out == f"holds: {name}\n"


HONEST = {
    "a gain": (lambda seed: rows_of(dict.fromkeys("abc", 0.5), seed=seed), ("b", "a"), {}, rows_of(LEVELS)),
    "a loss": (lambda seed: rows_of(dict.fromkeys("abc", 0.5), seed=seed), ("c", "a"), {"below": 0}, rows_of(LEVELS)),
    "more than a margin": (
        lambda seed: rows_of({"a": 0.5, "b": 0.52}, seed=seed), ("b", "a"), {"above": 0.02}, rows_of(LEVELS),
    ),
    "alike": (
        lambda seed: rows_of(LEVELS | {"d": 0.53}, seed=seed), ("d", "a"), {"within_margin": 0.03}, rows_of(LEVELS),
    ),
    "a choice made on other seeds": (
        lambda seed: rows_of(dict.fromkeys("abc", 0.5), seed=seed), chosen_on_others, {}, rows_of(LEVELS),
    ),
    "what goes with a gain": (pairs_of, gain_by_spread, {"shuffle": "spread"}, pairs_of(0, 0.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_what_can_fail_fails_on_data_made_under_its_negation_and_holds_on_others(claims, capsys, monkeypatch, name):
    made, effect, options, true = HONEST[name]
    claims.claim("true", name, true, effect, **options)
    assert claims.table().verdict["true"] == "holds" and claims.rows[0]["null"] <= MOST
    monkeypatch.setattr("clkit.experiments.claims.DRAWS", 2)
    found = []
    for seed in range(20):
        one = Claims(claims.page)
        one.claim("negated", name, made(seed), effect, **options)
        found += one.table().verdict.tolist()
    assert found.count("holds") <= 3
    claims.done()
    assert capsys.readouterr().out == f"holds: {name}\n"


def test_claims_print_verdicts_without_numbers_and_are_recorded(claims, capsys):
    rows = rows_of(LEVELS)
    claims.claim("gain", "b gains", rows, ("b", "a"), paper="abstract, 2")
    claims.claim("loss", "c gains", rows, ("c", "a"))
    claims.claim("alike", "d is like a", rows, ("d", "a"))
    claims.claim("few", "b gains on real images", rows[rows.seed < 4], ("b", "a"), scale="real")
    claims.claim("floor", "all the same", rows.assign(acc=rows.method.map(LEVELS)), ("b", "a"))
    claims.done()
    assert capsys.readouterr().out.splitlines() == [
        "holds: b gains", "does not hold: c gains", "open: d is like a",
        "open: b gains on real images (fewer than five seeds)", "open: all the same (every seed gives the same)",
    ]  # fmt: skip
    written = json.loads((claims.page.figures / "03-x-claims.json").read_text())["claims"]
    table, first = claims.table(), written[0]
    assert [row["key"] for row in written] == list(table.index) and first["claimed"] == [0, None]
    assert (first["paper"], first["scale"], first["n"], first["verdict"]) == ("abstract, 2", "fast", 5, "holds")
    assert [row["holm"] for row in written[:3]] == pytest.approx(list(holm([row["p"] for row in written[:3]])))
    assert table.p["gain"] == pytest.approx(first["holm"], abs=1e-4)
    assert [row["holm"] is None for row in written] == [False, False, False, True, True]
    by_seed = rows.pivot(index="seed", columns="method", values="acc")
    assert first["gaps"] == pytest.approx((by_seed.b - by_seed.a).tolist())
    assert [first[key] for key in ("effect", "lower", "upper", "n")] == pytest.approx(difference(first["gaps"]))


def test_a_verdict_that_differs_from_its_record_raises(claims, capsys, monkeypatch):
    rows = rows_of(LEVELS)
    claims.claim("gain", "it gains", rows, ("b", "a"))
    claims.done()
    before = (claims.page.figures / "03-x-claims.json").read_bytes()
    for key, pair in {"gain": ("c", "a"), "other": ("b", "a")}.items():
        again = page("03-x").claims()
        again.claim(key, "it gains", rows, pair)
        with pytest.raises(AssertionError, match=r"'gain' was holds, is (does not hold|None)"):
            again.done()
        assert (claims.page.figures / "03-x-claims.json").read_bytes() == before
    monkeypatch.setenv("CLKIT_RECORD", "1")
    for profile in ("fast", "paper"):
        again = page("03-x", profile).claims()
        again.claim("gain", "it gains", rows, ("c", "a"))
        again.done()
        end = "-paper" if profile == "paper" else ""
        [row] = json.loads((claims.page.figures / f"03-x-claims{end}.json").read_text())["claims"]
        assert (row["verdict"], row["scale"]) == ("does not hold", profile)


def test_checks_of_the_real_profile_leave_recorded_claims(claims):
    claims.claim("gain", "it gains", rows_of(LEVELS), ("b", "a"))
    claims.done()
    page("03-x", "real").checks().done()
    [row] = json.loads((claims.page.figures / "03-x-claims.json").read_text())["claims"]
    assert row["key"] == "gain"


def test_with_changed_parameters_claims_take_fewer_seeds_and_only_report(claims, capsys):
    for seeds in ([0, 1, 2, 3, 4], [0]):
        opened = page("03-x", SEEDS=seeds).claims()
        opened.claim("gain", "it gains", rows_of(LEVELS, len(seeds)), ("b", "a"))
        opened.done()
    opened.claim("same", "what is left of the grid", rows_of(LEVELS, 1), ("b", "b"))
    assert capsys.readouterr().out.endswith(
        "open: it gains (fewer than five seeds)\n"
        "claims: 'gain' was holds, is open; clkit figures --write records what is\n"
    )


REFUSED = {
    "four seeds": ({"table": rows_of(LEVELS, 4)}, "effect: of x it has 4 seeds; give five at least"),
    "a label that is not there": ({"effect": ("z", "a")}, "x: method: 'z' is unknown"),
    "a column that is not there": ({"shuffle": "alpha"}, "shuffle: of 'x' the column: 'alpha'"),
    "no pairs": ({"table": rows_of(LEVELS).query("seed < 4 or method == 'a'")}, "not paired by seed"),
    "one label in each group": ({"within": ("seed", "method")}, "changes nothing of 'x'"),
    "an effect of other columns": ({"effect": lambda rows: rows.groupby("seed").acc.mean()}, "changes nothing of 'x'"),
    "an effect that raises": ({"effect": lambda rows: rows.lost}, "effect: of x it raises"),
    "an effect that raises on shuffled rows": (
        {"effect": lambda rows: {s: float(rows.method.tolist() == list("abcd") * 5) ** -1 + s for s in range(5)}},
        "effect: of x, shuffled it raises",
    ),
    "no number": ({"effect": lambda rows: dict.fromkeys(range(5), math.nan)}, "give a finite number"),
    "numbers that are not the seeds'": (
        {"effect": lambda rows: (rows.acc - rows.acc.mean()).tolist()},
        "give a finite number for each seed",
    ),
    "a number for each row": (
        {"effect": lambda rows: rows.set_index("seed").acc},
        "give a finite number for each seed",
    ),
    "a value that is not there": ({"value": "accuracy"}, "value: of 'x' the column: 'accuracy'"),
    "no seeds": (
        {"table": rows_of(LEVELS).rename(columns={"seed": "s"}), "within": "s"},
        "table: of 'x' the column: 'seed'",
    ),
    "both ends": ({"above": 0, "below": 1}, "below: 'x' has above, too"),
    "no margin": ({"within_margin": 0}, "within_margin"),
    "another scale": ({"scale": "huge"}, "scale"),
    "a key again": ({"key": "y"}, "'y' or its text is claimed twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_claim_is_refused(claims, name):
    changed, message = REFUSED[name]
    claims.claim("y", "d gains", rows_of(LEVELS), ("d", "a"))
    with pytest.raises(ValueError, match=message):
        claims.claim(**{"key": "x", "text": "b gains", "table": rows_of(LEVELS), "effect": ("b", "a"), **changed})


def test_a_label_may_stand_in_several_columns_that_move_together(claims):
    rows = rows_of(LEVELS).assign(name=lambda rows: rows.method)

    def gap(found):
        assert (found.name == found.method).all()
        return found[found.name == "b"].set_index("seed").acc - found[found.method == "a"].set_index("seed").acc

    claims.claim("gain", "b gains", rows, gap, shuffle=("method", "name"))
    assert claims.rows[0]["null"] <= MOST


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name.removesuffix("-claims.json"))
def test_recorded_claims_are_few_and_could_have_failed(path):
    rows = json.loads(path.read_text(encoding="utf-8"))["claims"]
    assert len(rows) <= 12 and len({row["key"] for row in rows}) == len(rows)
    adjusted = holm([math.nan if row["note"] else row["p"] for row in rows])
    for row, p in zip(rows, adjusted, strict=True):
        low, high = row["claimed"]
        region = -math.inf if low is None else low, math.inf if high is None else high
        assert row["null"] <= MOST and row["scale"] in ("fast", "real") and (row["n"] >= 5 or row["scale"] == "real")
        assert [row[key] for key in ("effect", "lower", "upper", "n")] == pytest.approx(difference(row["gaps"]))
        assert row["p"] is None or row["p"] == pytest.approx(p_value(row["gaps"], *region))
        assert row["verdict"] == verdict(row["effect"], p, *region) and row["text"]
        within, outside = (
            region[0] < row["lower"] <= row["upper"] < region[1],
            not region[0] < row["effect"] < region[1],
        )
        assert {"holds": within, "does not hold": outside, "open": True}[row["verdict"]]

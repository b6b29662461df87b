"""The studies of representations: what they measure is what they say, on networks that hardly train."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from clkit import ER, HCMM, data, models, representation, weights
from clkit.experiments import grid, study
from studies import representations as studies
from studies.representations import _merged, _readout

SHORT = studies.CONVNET._replace(training=replace(studies.CONVNET.training, epochs=1))


@pytest.fixture(scope="module")
def two():
    return studies.pair(3, SHORT)


def test_a_pair_is_two_networks_and_how_they_began(two):
    assert not weights.equal(two.a, two.b) and not weights.equal(two.before[0], two.before[1])
    assert not weights.equal(two.a, two.before[0])
    assert len(two.x) == len(two.y) == len(two.stream[0].test)


def test_forgetting_is_from_after_learning_to_the_end():
    rows = [
        {"method": "ER", "seed": 0, "task": task, "after": after, "accuracy": 1 - 0.1 * after, "readout": 0.9,
         "cka": 1.0, "l1": 0.0, "l2": 0.2 * after, "cosine": 0.0, "control": 0.5}
        for task in range(5)
        for after in range(5 - task)
    ]  # fmt: skip
    table = studies.forgotten(pd.DataFrame(rows))
    assert len(table) == 1
    np.testing.assert_allclose(table.forgetting, 0.1 * np.mean([4, 3, 2, 1]))
    np.testing.assert_allclose(table.l2, 0.2 * np.mean([4, 3, 2, 1]))
    np.testing.assert_allclose(table[["readout_lost", "drift"]], 0, atol=1e-12)
    nearer = pd.DataFrame(rows).assign(method="SFA", l2=lambda t: t.l2 / 2)
    found = studies.farther(pd.concat([nearer, pd.DataFrame(rows)]), "SFA", "ER", "l2")
    assert found.to_dict() == {0: pytest.approx(-0.25)}


def test_the_seed_draws_images_and_the_order_of_digits():
    one, other = (studies.five_tasks(seed) for seed in (0, 1))
    assert one[0].classes != other[0].classes and len(one[0].train) != len(other[0].train)
    first, second = (studies.drawn("digits", seed).test.x for seed in (0, 1))
    assert first.shape == second.shape and not torch.equal(first, second)


def test_few_examples_are_unrelated():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    table = studies.few_examples(x, 2 * x, [8, 40], draws=3)
    assert len(table) == 2 * 3 * 2 and (table[table.estimate == "biased"].cka < 0.9).all()
    assert table[(table.n == 40) & (table.estimate == "unbiased")].cka.abs().max() < 0.5


def test_counterparts_count_stages_that_find_themselves():
    a, b = studies.STAGES[:2]
    rows = [(p, 0, a, a, 0.9) for p in ("both trained", "neither trained")]
    rows += [("both trained", 0, a, b, 0.5), ("both trained", 0, a, "conv1", 1.0), ("neither trained", 0, a, b, 1.0)]
    table = pd.DataFrame(rows, columns=["pair", "seed", "layer", "other", "cka"])
    assert studies.counterparts(table).to_dict() == {0: 1.0}


def test_what_is_recovered_is_a_share_of_what_an_aligned_merge_lost():
    rows = [("convnet", 0, "aligned", 0.5, 0.9), ("convnet", 0, "aligned, restored", 0.8, 0.9)]
    table = pd.DataFrame(rows, columns=["network", "seed", "variant", "accuracy", "parents"])
    assert studies.recovered(table).to_dict() == {0: pytest.approx(0.75)}


def test_merging_aligns_restores_and_scores(two):
    rows = pd.DataFrame(_merged(two, ("norm1", "linear")))
    assert len(rows) == 2 * 2 * 2
    mean = rows[rows.layer == "norm1"].set_index("variant")
    assert mean.ratio["aligned, restored"] == pytest.approx(1, abs=0.05)
    assert mean.ratio["aligned"] > mean.ratio["plain"]
    assert mean.correlation["aligned"] > mean.correlation["plain"] + 0.2
    assert rows.accuracy.between(0, 1).all() and rows.parents.nunique() == 1


def test_united_are_the_ends_and_their_merge(two):
    found = studies.united(two.model, two.a, two.b, 0.3, two.inputs, two.x[:20])
    np.testing.assert_array_equal(found["new"], representation.features(two.model, two.x[:20], weights=two.b))
    same = studies.united(two.model, two.a, two.a, 0.3, two.inputs, two.x[:20])
    assert list(found) == ["old", "new", "merged"] and torch.allclose(same["merged"], same["old"], atol=0.5)


def test_moved_features_have_the_distance_asked_for():
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    spread = float((x - x.mean(0)).square().mean(1).sqrt().mean())
    for noise in (False, True):
        found = studies.moved(x, 2.0, noise, method="pca")
        assert found.agreement.l2[0] == pytest.approx(2 * spread, rel=1e-5)
    assert studies.moved(x, 2.0, method="pca").agreement.cka[0] == pytest.approx(1)


def test_the_gap_is_in_radii():
    ring = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=float)
    points = pd.DataFrame(np.concatenate([2 * ring, 2 * ring + [6, 0]]), columns=["x", "y"])
    assert studies.gap(points.assign(model=["a"] * 4 + ["b"] * 4)) == pytest.approx(3)


def test_a_readout_finds_what_features_hold():
    stream = data.split(data.digits(), 5)
    net = models.convnet(stream, seed=0)
    readout = _readout(net, stream, 2)
    x = stream[1].prepare(stream[1].test.x)
    found = readout(representation.features(net, x))
    assert (found == stream[1].test.y).double().mean() > 0.9
    assert set(found.tolist()) <= set(stream[0].classes + stream[1].classes)


def test_corrections_are_beside_the_run_without_one():
    rows = [
        {"seed": 0, "strength": s, "task": t, "new": n, "old": n, "accuracy": a}
        for s, n, a in (("none", 0.4, 0.8), ("ridge 1", 0.1, 0.6))
        for t in (1, 2)
    ]
    table = studies.beside_none(pd.DataFrame(rows))
    assert table.iloc[0].to_dict() == {"strength": "ridge 1", "seed": 0, "new": 0.1, "old": 0.1, "accuracy": 0.6,
                                       "new_none": 0.4, "old_none": 0.4, "accuracy_none": 0.8}  # fmt: skip


def test_a_study_has_a_row_for_each_thing_measured(tmp_path):
    short = SHORT._replace(on_tasks=SHORT.training)
    plan = study(studies.drift, [0], method=grid(ER, memory=50), network={"short": short})
    moves = plan.run(store=tmp_path, jobs=1)
    assert len(moves) == 5 + 4 + 3 + 2 + 1 and set(moves.method) == {"ER"}
    assert (moves[moves.after == 0].cka == 1).all() and (moves[moves.after == 0].l2 == 0).all()
    assert "epochs=1" in str(plan.config["network"]) and "ER(memory=50" in repr(plan.config["method"])
    made = study(studies.merging, [0], network={"convnet": short}).run(store=tmp_path, jobs=1)
    assert set(made.kind) == {"independent", "sequential"} and len(made) == 2 * 2 * 2 * len(short.layers)
    alike = study(studies.likeness, [0], network={"short": SHORT}, layers={"two": ("conv1", "linear")}).run(
        store=tmp_path, jobs=1
    )
    assert len(alike) == 2 * 4 and alike.cka.between(-0.1, 1).all()


def test_corrections_are_measured_after_every_merge():
    [rule] = grid(HCMM, "ridge", alpha=0.5, correction="ridge", ridge=1.0).values()
    short = replace(studies.TUNING, epochs=1)
    rows = studies.correction(0, rule, 8, replace(studies.ENCODING, epochs=1), short)
    assert [row["task"] for row in rows] == [1, 2, 3]
    assert all(row["new"] > 0 and row["old"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows)

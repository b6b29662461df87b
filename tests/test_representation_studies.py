"""The studies of representations: what they measure is what they say, on networks that hardly train."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from clkit import ER, HCMM, data, models, representation, weights
from clkit.experiments import contrasts, grid, study
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


def test_few_examples_pair_images_or_shuffle_them():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    table = studies.few_examples(x, 2 * x, [8, 40], draws=3)
    assert len(table) == 2 * 3 * 4
    same = table[table.images == "the same"].cka
    np.testing.assert_allclose(same, 1, atol=1e-9)
    far = table[(table.images == "shuffled") & (table.n == 40) & (table.estimate == "unbiased")].cka
    assert far.abs().max() < 0.5


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


def test_verdicts_are_against_er_and_of_drift():
    rows = [
        {"method": method, "seed": seed, "task": 0, "after": after, "accuracy": 1.0, "readout": 1.0, "control": 0.5,
         "cka": 0.9 + 0.01 * seed + nearer[seed], "l1": 0.5 + far[seed], "l2": far[seed], "cosine": far[seed]}
        for method, nearer, far in (("ER", [0] * 3, [0.5, 0.6, 0.7]), ("SFA", [0.05, 0.051, 0.049], [0.2, 0.31, 0.39]))
        for seed in range(3)
        for after in (0, 1)
    ]  # fmt: skip
    table = studies.forgotten(pd.DataFrame([*rows, rows[0] | {"task": 1, "after": 0}]))
    long = table.melt(["method", "seed"], ["l1", "l2", "cosine", "drift"], "measure")
    found = contrasts(long, {"SFA": ("SFA", "ER")}, "value", within=["measure"]).verdict
    assert len(found) == 4 and set(found) == {"loses"}


def test_variants_keep_the_repair_that_a_network_needs():
    rows = [
        {"network": n, "ends": e, "variant": v}
        for n in studies.NETWORKS
        for e in ("plain", "aligned")
        for v in ("merged", "refreshed", "repaired")
    ]
    table = studies.by_variant(pd.DataFrame(rows).assign(kept=lambda t: t.variant))
    names = ["plain", "plain, restored", "aligned", "aligned, restored"]
    assert list(table.variant) == 2 * names
    assert set(table[table.network == "convnet"].kept) == {"merged", "refreshed"}
    assert set(table[table.network == "perceptron"].kept) == {"merged", "repaired"}


def test_counterparts_count_layers_that_find_themselves():
    rows = [("p", 0, "a", "a", 0.9), ("p", 0, "a", "b", 0.5), ("p", 0, "b", "a", 0.7), ("p", 0, "b", "b", 0.6)]
    rows += [("p", 0, "a", "c", 1.0)]
    table = pd.DataFrame(rows, columns=["pair", "seed", "layer", "other", "linear"])
    assert studies.counterparts(table, ["a", "b"])["p"] == 0.5


def test_a_merge_on_the_way_keeps_all_at_its_ends(two):
    table = studies.variance_along(two, {"same": two.a, "other": two.b}, ["norm1"], points=3)
    same = table[table.variant == "same, norm1"].ratio
    np.testing.assert_allclose(same, 1, rtol=1e-5)
    other = table[table.variant == "other, norm1"].ratio.to_numpy()
    assert abs(other[[0, 2]].mean() - 1) < 1e-6 and other[1] < 0.9


def test_merging_aligns_restores_and_scores(two):
    rows = pd.DataFrame(_merged(two, ("norm1", "linear")))
    assert len(rows) == 2 * 3 * 2
    mean = rows[rows.layer == "norm1"].set_index(["ends", "variant"])
    assert mean.ratio["aligned", "merged"] > mean.ratio["plain", "merged"]
    assert mean.correlation["aligned", "merged"] > mean.correlation["plain", "merged"] + 0.2
    assert rows.accuracy.between(0, 1).all() and rows.parents.nunique() == 1


def test_halfway_holds_the_ends_and_their_mean(two):
    found = studies.halfway(two, two.b, two.x[:20])
    np.testing.assert_array_equal(found["other"], representation.features(two.model, two.x[:20], weights=two.b))
    assert list(found) == ["one", "other", "merged"]


def test_moved_features_have_the_distance_asked_for():
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    spread = float((x - x.mean(0)).square().mean(1).sqrt().mean())
    for by in ("shift", "noise"):
        found = studies.moved(x, 2.0, by, method="pca")
        assert found.agreement.l2[0] == pytest.approx(2 * spread, rel=1e-5)
    assert studies.moved(x, 2.0, method="pca").agreement.cka[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="by: 'turn'"):
        studies.moved(x, 1.0, "turn")  # type: ignore[arg-type]


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


def test_a_correction_brings_old_classes_nearer():
    made = grid(HCMM, "{correction}", alpha=0.5, correction=("none", "ridge"), ridge=1.0)
    clouds = (studies.cloud(rule, 0, 8, replace(studies.ENCODING, epochs=1)) for rule in made.values())
    none, ridge = (cloud.agreement.l2[0] for cloud in clouds)
    assert 0 < ridge < none


def test_a_study_has_a_row_for_each_thing_measured(tmp_path):
    short = SHORT._replace(on_tasks=SHORT.training)
    plan = study(studies.drift, [0], method=grid(ER, memory=50), network={"short": short})
    moves = plan.run(store=tmp_path, jobs=1)
    assert len(moves) == 5 + 4 + 3 + 2 + 1 and set(moves.method) == {"ER"}
    assert (moves[moves.after == 0].cka == 1).all() and (moves[moves.after == 0].l2 == 0).all()
    assert "epochs=1" in str(plan.config["network"]) and "ER(memory=50" in repr(plan.config["method"])
    made = study(studies.merging, [0], network={"convnet": short}).run(store=tmp_path, jobs=1)
    assert set(made.kind) == {"independent", "sequential"} and len(made) == 2 * 2 * 3 * len(short.layers)
    alike = study(studies.likeness, [0], network={"short": SHORT}, layers={"two": ("conv1", "linear")}).run(
        store=tmp_path, jobs=1
    )
    assert len(alike) == 3 * 4 and alike.linear.between(0, 1).all()


def test_corrections_are_measured_after_every_merge():
    [rule] = grid(HCMM, "ridge", alpha=0.5, correction="ridge", ridge=1.0).values()
    short = replace(studies.TUNING, epochs=1)
    rows = studies.correction(0, rule, 8, replace(studies.ENCODING, epochs=1), short)
    assert [row["task"] for row in rows] == [1, 2, 3]
    assert all(row["new"] > 0 and row["old"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows)

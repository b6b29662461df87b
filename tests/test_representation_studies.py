"""The studies of representations: what they measure is what they say, on networks that hardly train."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from clkit import data, models, representation, weights
from studies import representations as studies
from studies.representations.studies import _merged, _readout

SHORT = replace(studies.TRAINING, epochs=1)


@pytest.fixture(scope="module")
def two():
    return studies.pair(3, training=SHORT)


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
        for task in range(studies.TASKS)
        for after in range(studies.TASKS - task)
    ]  # fmt: skip
    table = studies.forgotten(pd.DataFrame(rows))
    assert len(table) == 1
    np.testing.assert_allclose(table.forgetting, 0.1 * np.mean([4, 3, 2, 1]))
    np.testing.assert_allclose(table.l2, 0.2 * np.mean([4, 3, 2, 1]))
    np.testing.assert_allclose(table.readout_lost, 0, atol=1e-12)


def test_verdicts_are_against_er_and_of_drift():
    table = pd.DataFrame({"method": ["ER"] * 3 + ["SFA"] * 3, "seed": [0, 1, 2] * 2, "cka": [0.9, 0.91, 0.92] * 2})
    for value in ("l1", "l2", "cosine", "forgetting"):
        table[value] = [0.5, 0.6, 0.7, 0.2, 0.31, 0.39]
    table.loc[3:, "cka"] += [0.05, 0.051, 0.049]
    found = studies.than_er(table)
    assert list(found.index) == ["SFA"] and set(found.loc["SFA"]) == {"loses"}


def test_restored_keeps_the_repair_that_a_network_needs():
    rows = [
        {"network": n, "ends": e, "variant": v}
        for n in studies.SETTINGS
        for e in ("plain", "aligned")
        for v in ("merged", "refreshed", "repaired")
    ]
    table = studies.restored(pd.DataFrame(rows).assign(kept=lambda t: t.variant))
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
    table = studies.along(two, {"same": two.a, "other": two.b}, ["norm1"], points=3)
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
        studies.moved(x, 1.0, "turn")


def test_the_gap_is_in_radii():
    ring = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=float)
    points = pd.DataFrame(np.concatenate([2 * ring, 2 * ring + [6, 0]]), columns=["x", "y"])
    assert studies.gap(points.assign(model=["a"] * 4 + ["b"] * 4)) == pytest.approx(3)


def test_a_readout_finds_what_features_hold():
    stream = data.split(data.digits(), studies.TASKS)
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
    table = studies.against_none(pd.DataFrame(rows))
    assert table.iloc[0].to_dict() == {"strength": "ridge 1", "seed": 0, "new": 0.1, "old": 0.1, "accuracy": 0.6,
                                       "new_none": 0.4, "old_none": 0.4, "accuracy_none": 0.8}  # fmt: skip


def test_a_correction_brings_old_classes_nearer():
    found = studies.clouds(["none", "ridge 1"], 0, 8, replace(studies.ENCODING, epochs=1), studies.TUNING)
    none, ridge = (found[name].agreement.l2[0] for name in ("none", "ridge 1"))
    assert 0 < ridge < none


def test_unknown_studies_are_named():
    assert {name: studies.config(name)["study"] for name in studies.STUDIES}.keys() == set(studies.STUDIES)
    with pytest.raises(ValueError, match="study: 'drfit'"):
        studies.config("drfit")

"""The merging atlas: what is held out stays held out, and a merge of the zoo is that of the consolidation."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from clkit import models, run, weights
from clkit.consolidation import Merging
from clkit.evaluation import evaluate
from clkit.merging import MERGES
from studies import atlas

SHORT = replace(atlas.ADAM, epochs=1, lr=0.003)
SMALL = {"training": SHORT, "earlier": replace(atlas.EARLIER, epochs=2), "per_class": 10,
         "model": partial(models.mlp, hidden=(24, 16))}  # fmt: skip


@pytest.fixture(scope="module")
def made():
    return atlas.zoo(3, **SMALL)


def test_held_out_data_are_in_neither_of_the_other_parts():
    tasks, judged, earlier = atlas.scripts(1, per_class=20)
    assert sorted(task.name for task in tasks) == sorted(atlas.TASKS) and len(earlier[0].classes) == 80
    for task, other in zip(tasks, judged, strict=True):
        assert task.classes == other.classes and torch.equal(task.train.x, other.train.x)
        assert torch.bincount(other.test.y)[list(task.classes)].tolist() == [4] * 10
        seen = [{x.numpy().tobytes() for x in part} for part in (task.train.x, task.test.x, other.test.x)]
        assert not seen[2] & (seen[0] | seen[1])


def test_the_seed_draws_characters_and_order():
    first, second = (atlas.scripts(seed, per_class=5)[0] for seed in (0, 1))
    assert first.classes != second.classes
    assert [task.name for task in first] != [task.name for task in second]


def test_no_head_trains(made):
    for training in atlas.TRAININGS:
        for vector in made.vectors(training):
            assert all(bool((t == 0).all()) == name.startswith("linear.") for name, t in vector.items())


@pytest.mark.parametrize("training", atlas.TRAININGS)
@pytest.mark.parametrize("name, options", [("ties", {}), ("interpolate", {"t": 0.3}), ("wise_ft", {"alpha": 0.7})])
def test_a_merge_is_what_the_consolidation_deploys(made, name, options, training):
    for parameter in made.model.linear.parameters():
        parameter.requires_grad_(False)
    weights.set_weights(made.model, made.base)
    rule = Merging(name, options, training=training)
    found = run(made.stream, made.model, None, rule, SHORT, seed=3, device="cpu", progress=False)
    ours = made.merge(name, training, **options)[0]
    assert all(torch.allclose(ours[n], t, atol=1e-6) for n, t in found.weights[-1].items())
    np.testing.assert_allclose(made.accuracy([ours] * 8), found.masked[-1], atol=0.011)  # one of 20 test rows in 5


def test_every_setting_of_every_merge_works(made):
    for name in atlas.NAMES:
        for options in atlas.settings(name):
            assert set(options) <= set(atlas.KNOBS)
            merged = made.merge(name, **options)
            assert len(merged) == 8 and all(bool(t.isfinite().all()) for w in merged for t in w.values())


def test_accuracy_takes_each_tasks_own_weights(made):
    ws, slow = made.networks["independent"], []
    for task in range(8):
        weights.set_weights(made.model, ws[task])
        slow.append(evaluate(made.model, made.held_out).masked[task])
    assert made.accuracy(ws, held_out=True).tolist() == slow
    same = made.accuracy([made.base] * 8)
    weights.set_weights(made.model, made.base)
    assert same.tolist() == evaluate(made.model, made.stream).masked.tolist()


def test_every_task_has_its_own_mask(made):
    for i, masked in enumerate(made.merge(atlas.MASKED)):
        assert weights.equal(masked, MERGES["emr"](made.networks["independent"], base=made.base, task=i))


def test_options_are_chosen_on_held_out_data_alone():
    rows = [("a", 0.5, 0.9), ("a", 0.7, 0.1), ("a", 0.7, 0.2), ("b", 0.1, 0.3)]
    table = pd.DataFrame(rows, columns=["method", "held_out", "acc"]).assign(seed=0, training="independent")
    assert atlas.chosen(table).acc.tolist() == [0.1, 0.3]


def test_the_table_has_a_row_for_every_setting():
    table = pd.DataFrame(atlas.merges(3, ("average", "magmax"), **SMALL))
    assert len(table) == 2 * (1 + 1 + len(atlas.SEARCHED["magmax"])) and table.untuned.sum() == 4
    assert table[table.method == "magmax"].scale.iloc[0] == 0.5 and table[table.method == "average"].scale.isna().all()
    assert table.held_out.between(0, 1).all() and table.acc.between(0, 1).all()
    found = pd.DataFrame(atlas.references(3, **SMALL)).set_index("reference").acc
    assert found["each its own"] > found["start"]


def test_networks_that_began_apart_share_no_base(monkeypatch):
    short = {"training": replace(SHORT, epochs=0), "per_class": 5}
    apart, random = (atlas.zoo(0, start, **short) for start in ("apart", "random"))
    assert all(weights.equal(w, random.base) for w in random.networks["independent"])
    first, second = apart.networks["independent"][:2]
    assert weights.norm(weights.sub(first, second)) > 1 and not weights.equal(first, apart.base)
    with pytest.raises(ValueError, match=r"start.*'zero'.*choose one of"):
        atlas.zoo(0, "zero")


def test_starts_choose_a_scale_on_held_out_data(monkeypatch):
    """On a zoo in which every merge says what it was given, and held-out data prefer the smallest scale."""

    def accuracy(merged, *, held_out=False):
        return np.array(merged) * (-1 if held_out else 1)

    def merge(name, **options):
        return [options.get("scale", 0.0)] * 8

    fake = SimpleNamespace(networks={"independent": [3.0] * 8}, merge=merge, accuracy=accuracy)
    monkeypatch.setattr(atlas, "zoo", lambda seed, **made: fake)
    assert [atlas.starts(0, start)["task_arithmetic"] for start in atlas.STARTS] == pytest.approx([0.05] * 3)


def test_relations_of_known_vectors():
    found = atlas.relations([{"w": torch.tensor(v)} for v in ([3.0, 0.0, 1.0], [0.0, 3.0, 0.0])])
    assert found["cosine"] == 0 and np.isnan(found["agree"])
    copies = atlas.relations([{"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([2.0, -4.0])}])
    assert copies["cosine"] == pytest.approx(1) and copies["agree"] == 1 and np.shape(copies["matrix"]) == (2, 2)
    against = atlas.relations([{"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([-1.0, 2.0])}])
    assert against["cosine"] == pytest.approx(-1) and against["agree"] == 0 and against["length"] == 0


def test_the_merge_beside_joint_training_is_chosen_on_held_out_data():
    rows = [
        (0, "a", 0.9, 0.3),
        (0, "b", 0.8, 0.9),
        (0, atlas.MASKED, 1.0, 1.0),
        (0, "joint", np.nan, 0.5),
        (1, "a", 0.9, 0.3),
    ]
    found = atlas.above_joint(pd.DataFrame(rows, columns=["seed", "method", "held_out", "acc"]))
    assert found.to_dict() == {0: pytest.approx(-0.2)}

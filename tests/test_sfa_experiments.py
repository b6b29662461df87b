"""SFA's experiments: what the grids hold, and what is measured in a run."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import toys
from clkit.consolidation import SFA, merge_steps
from clkit.experiments import sweep
from clkit.training import Training
from clkit.weights import norm, sub
from studies import sfa
from studies.sfa.grids import LETTERS
from toys import quick

GRIDS = {
    "digits": sfa.frontier,
    "shared": partial(sfa.frontier, "digits", "shared"),
    "mnist": partial(sfa.frontier, "mnist"),
    "adaptive": sfa.adaptive,
    "similarity": sfa.similarity,
    "long": sfa.long,
    "checkpoints": sfa.checkpoints,
    "conflict": sfa.conflict,
    "parts": sfa.parts,
    "letters": sfa.streams,
    "cifar100": partial(sfa.streams, "cifar100"),
    "paper": partial(sfa.streams, "cifar100", "paper"),
    "against L2": sfa.against_l2,
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_is_its_own_record_and_needs_no_data(name, monkeypatch):
    monkeypatch.delenv("CLKIT_DATA", raising=False)
    grid = GRIDS[name]()
    record = json.loads(json.dumps(grid.config))
    assert record == GRIDS[name]().config and record["methods"].keys() == grid.methods.keys()
    assert len(grid.seeds) >= 2 and "object at" not in str(record)


@pytest.mark.parametrize("name", ["digits", "shared", "similarity", "conflict", "checkpoints"])
def test_its_streams_can_be_made(name):
    grid = GRIDS[name]()
    for make in grid.streams.values():
        stream = make(1)
        assert len(stream) >= 2 and make(1).fingerprint == stream.fingerprint


def test_even_and_odd_in_three_heads():
    masked, shared, plain = (sfa.even_odd("digits", head) for head in ("masked", "shared", "plain"))
    assert (masked.scenario, shared.scenario, plain.scenario) == ("task", "domain", "class")
    assert masked[0].classes == (0, 2, 4, 6, 8) and len(shared.classes) == 5 and len(plain.classes) == 10
    assert torch.equal(shared[0].train.y, plain[0].train.y // 2) and torch.equal(
        shared[1].train.y, plain[1].train.y // 2
    )
    with pytest.raises(ValueError, match="head: 'maskd'"):
        sfa.even_odd("digits", "maskd")


def test_letters_are_a_hundred_classes_in_an_order_of_the_seed():
    grid = sfa.streams()
    [make] = grid.streams.values()
    one, other = make(0), make(1)
    assert len(one) == 20 and all(len(task.classes) == 5 for task in one) and one.scenario == "task"
    assert len({c for task in one for c in task.classes}) == 100 and one[0].classes != other[0].classes
    assert LETTERS == "latin+armenian"


def test_knobs_are_what_the_methods_are_set_to():
    grid = sfa.frontier()
    table = sfa.knobs(pd.DataFrame({"method": list(grid.methods)}), grid).set_index("method")
    assert tuple(table.loc["SFA p=0.25 β=0.3"][["kind", "p", "beta"]]) == ("SFA", 0.25, 0.3)
    assert table.kind["L2 λ=0.1"] == "L2" and table.strength["L2 λ=0.1"] == 0.1 and np.isnan(table.p["L2 λ=0.1"])
    assert table.kind["fine-tuning"] == "fine-tuning" and table.share["buffer 10%, half"] == 0.1
    assert set(table.kind) == {"SFA", "L2", "EWC", "data buffer", "fine-tuning", "joint"}


def test_lines_are_compared_at_equal_plasticity():
    grid = sfa.frontier()
    names = ["SFA p=0.25 β=0.3", "SFA p=0.25 β=0.5", "SFA p=1 β=0.3", "buffer 5%, half", "buffer 5%, concatenate"]
    table = pd.DataFrame(
        {"method": names, "seed": 0, "new": [0.9, 0.7, 0.9, 0.9, 0.9], "old": [0.5, 0.9, 0.1, 0.2, 0.3]}
    )
    table = sfa.lines(sfa.knobs(table, grid))
    assert table.line.tolist() == ["SFA p = 0.25"] * 2 + ["WiSE-FT (p = 1)", "buffer, half of a batch", "buffer"]
    found = sfa.retained(table, 0.75)
    assert found.line.tolist() == ["SFA p = 0.25"] and found.old.tolist() == [pytest.approx(0.8)]
    assert not len(sfa.retained(table, 0.6))
    both = pd.concat([table, table.assign(seed=1, new=table.new + 0.08)])
    assert not len(sfa.retained(both, 0.75)), "one of two seeds reaches it"
    assert len(sfa.retained(both, 0.85)) == 2


def test_an_advantage_is_paired():
    old = {"a": [0.6, 0.71, 0.82], "b": [0.5, 0.6, 0.7]}
    rows = [{"line": line, "seed": s, "old": value} for line, values in old.items() for s, value in enumerate(values)]
    found = sfa.advantage(pd.DataFrame(rows), "a", "b")
    half = 4.302653 * 0.01 / 3**0.5
    assert found == pytest.approx((0.11, 0.11 - half, 0.11 + half, 3)) and found.verdict == "gains"


def test_ends_and_course_of_a_run():
    result = quick(toys.stream(), None, SFA(0.5), training=Training(epochs=8, batch=8, lr=0.1))
    found, steps = sfa.ends(result), len(result.training_loss[-1])
    assert found["old"] == pytest.approx(result.accuracy[-1, :2].mean()) and found["new"] == result.accuracy[-1, 2]
    assert found["merges"] == len(merge_steps(steps, 0.5)) and 10 <= found["steps"] <= steps
    window = result.training_loss[-1][found["steps"] - 10 : found["steps"]]
    assert found["steps"] == steps or window.mean() < 0.3
    course = sfa.course(result)
    assert course["first"] == result.accuracy[:, 0].tolist() and course["newest"][1] == result.accuracy[1, 1]
    assert course["seen"][1] == pytest.approx(result.accuracy[1, :2].mean()) and course["distance"][0] == 0
    way = norm(sub(result.weights[2], result.weights[0])) / norm(result.weights[0])
    assert course["distance"][2] == pytest.approx(way)


def test_both_sides_of_every_merge():
    table = sfa.merges(seeds=(0,))
    assert table.number.tolist() == [1, 2, 3, 4] and (table.barrier >= -1e-6).all()
    assert (table.old_after >= table.old_before - 0.02).all() and (table.new_after <= table.new_before + 0.02).all()


def test_the_sawtooth_has_a_table_for_every_rule():
    training = Training(epochs=2, batch=32, lr=0.1, labels="task")
    table = sfa.sawtooth(sfa.even_odd(), {"none": None, "SFA": SFA(0.5)}, training, every=10)
    counts = table[table.task == 0].groupby(["method", "when"]).size()
    assert counts["SFA", "before"] == counts["SFA", "after"] == 2 and ("none", "before") not in counts


def test_contradiction_turns_gradients_against_each_other():
    table = sfa.contradiction((0.0, 1.0), seeds=(0,)).set_index("conflict")
    assert table.start[1.0] < 0 < table.start[0.0] and (table.abs() <= 1).all().all()


def test_costs_are_counted():
    table = sfa.costs(parameters=1000, example=65, rows=100, tasks=3, steps=20, batch=10, p=0.25)
    assert table.kept["SFA p=0.25"] == 4000 and table.kept["EWC"] == 8000 and table.kept["task arithmetic"] == 16000
    assert table.kept["buffer 10%"] == 2 * 10 * 65 and table.flops["buffer 10%"] == 0
    assert table.flops["SFA p=0.25"] == 3 * 1000 * 4 * 2 and table.moved["WiSE-FT"] == 12000 * 2
    assert table.flops_share["L2"] == pytest.approx(3 * 1000 * 20 * 2 / (3 * 20 * 10 * 6 * 1000))


def test_a_pretrained_transformer_keeps_its_body_and_gets_a_fresh_head(monkeypatch):
    from studies.sfa import grids

    stream = next(iter(sfa.streams().streams.values()))(0)
    body = {n: t + 1 for n, t in grids.weights.get_weights(grids._vit(stream, seed=9)).items()}
    monkeypatch.setattr(grids, "_body", lambda source: body)
    net = grids.weights.get_weights(sfa.pretrained(stream, seed=3))
    fresh = grids.weights.get_weights(grids._vit(stream, seed=3))
    for name, tensor in net.items():
        assert torch.equal(tensor, fresh[name] if name.startswith("linear.") else body[name]), name


@pytest.mark.packs("mnist")
def test_real_mnist_even_then_odd_on_one_plane(packs, monkeypatch, tmp_path):
    """Each of the plane's kinds of method once, on few images: both ends of the trade are where they should be."""
    monkeypatch.setenv("CLKIT_DATA", str(packs))
    grid = sfa.frontier("mnist", "shared")
    chosen = ["fine-tuning", "SFA p=0.25 β=0.5", "SFA p=1 β=0.3", "L2 λ=0.3", "EWC λ=30", "buffer 10%, half"]
    methods, stream = {name: grid.methods[name] for name in chosen}, sfa.even_odd("mnist", "shared", limit=80)
    table = sweep(
        stream,
        sfa.small_mlp,
        methods,
        training=Training(15, 32, 0.1),
        measure=sfa.ends,
        jobs=1,
        progress=False,
        store=tmp_path,
    )
    found = table.set_index("method")[["old", "new"]]
    plain = found.loc["fine-tuning"]
    for name in chosen[1:]:
        assert found.old[name] > plain.old + 0.02 and found.new[name] <= plain.new + 0.05, name
    assert found.old["SFA p=0.25 β=0.5"] == found.old.max()

"""SFA's experiments: what the grids hold, and what is measured in a run."""

import json
import sys
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch

import toys
from clkit import data, models, run
from clkit.consolidation import SFA, merge_steps
from clkit.data import Dataset, Examples
from clkit.experiments import contrasts, grid, sweep
from clkit.learners import EWC, L2, DataBuffer, Learner
from clkit.training import Training
from clkit.weights import norm, sub
from studies import sfa
from studies.sfa.images import LETTERS
from toys import quick

METHODS = grid(Learner) | grid(SFA, "SFA p={p:g} β={beta:g}", p=(0.25, 1.0), beta=(0.3, 0.5))
COMPARISONS = {
    "digits": partial(sfa.plane, METHODS),
    "shared": partial(sfa.plane, METHODS, head="shared"),
    "mnist": partial(sfa.plane, METHODS, "mnist"),
    "parts": sfa.parts,
    "similarity": sfa.similarity,
    "hundred": sfa.hundred,
    "checkpoints": sfa.checkpoints,
    "conflicts": sfa.conflicts,
    "letters": partial(sfa.long_streams, METHODS),
    "paper": partial(sfa.long_streams, METHODS, "paper"),
    "real": sfa.real,
    "real texts": partial(sfa.real_texts, METHODS),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_is_its_own_record_and_needs_no_data(name, monkeypatch):
    monkeypatch.delenv("CLKIT_DATA", raising=False)
    whole = COMPARISONS[name]()
    record = json.loads(json.dumps(whole.config))
    assert record == COMPARISONS[name]().config and record["methods"].keys() == whole.methods.keys()
    assert len(whole.seeds) >= 2 and "object at" not in str(record)


MAKERS = {
    "digits": sfa.even_odd,
    "shared": partial(sfa.even_odd, head="shared"),
    "rotated": partial(sfa.rotated, angle=30),
    "permuted": partial(sfa.permuted, tasks=10, pixels=0.5),
    "conflict": partial(sfa.conflicting, conflict=0.5),
    "conflict, marked": partial(sfa.conflicting, conflict=0.5, marked=True),
}


@pytest.mark.parametrize("name", MAKERS)
def test_its_streams_can_be_made(name):
    stream = MAKERS[name](1)
    assert len(stream) >= 2 and MAKERS[name](1).fingerprint == stream.fingerprint


def test_parts_say_which_setting_they_change():
    whole = sfa.parts()
    rows = {"stream": next(iter(whole.streams)), "model": "mlp 128-64", "training": "Training"}
    table = whole.complete(pd.DataFrame({"method": list(whole.methods)}).assign(**rows)).set_index("method")
    assert table.setting["p=0.25"] == "as in the paper" and table.p["p=0.96, no final merge"] == 0.96
    assert not table.final["p=0.96, no final merge"] and table.schedule["p=0.96, cosine schedule"] == "cosine"
    assert table.optimizer["p=0.25, Adam, state reset"] == "reset" and "p=0.25, no final merge" not in table.index
    assert table.training_optimizer["p=0.25, Adam, state kept"] == "adamw" and len(table) == 2 * 8 + 1


def test_even_and_odd_in_three_heads_and_in_an_order_of_the_seed():
    masked, shared, plain = (sfa.even_odd(3, head=head) for head in ("masked", "shared", "plain"))
    assert (masked.scenario, shared.scenario, plain.scenario) == ("task", "domain", "class")
    assert set(masked[0].classes) == {0, 2, 4, 6, 8} and len(shared.classes) == 5 and len(plain.classes) == 10
    for task, own in zip(shared, masked, strict=True):
        assert torch.equal(torch.tensor(own.classes)[task.train.y], own.train.y)
    other = sfa.even_odd(4)
    assert other[0].classes != masked[0].classes and set(other[1].classes) == set(masked[1].classes)
    assert sorted(other[0].test.x.flatten(1).sum(1).tolist()) != sorted(masked[0].test.x.flatten(1).sum(1).tolist())
    with pytest.raises(ValueError, match="head: 'maskd'"):
        sfa.even_odd(head="maskd")


def test_letters_are_a_hundred_classes_in_an_order_of_the_seed():
    [make] = sfa.long_streams(METHODS).streams.values()
    one, other = make(0), make(1)
    assert len(one) == 20 and all(len(task.classes) == 5 for task in one) and one.scenario == "task"
    assert len({c for task in one for c in task.classes}) == 100 and one[0].classes != other[0].classes
    assert LETTERS == "latin+armenian"


def test_lines_are_compared_at_equal_plasticity():
    lines = ["SFA p = 0.25"] * 2 + ["WiSE-FT (p = 1)"]
    table = pd.DataFrame({"line": lines, "seed": 0, "new": [0.9, 0.7, 0.9], "old": [0.5, 0.9, 0.1]})
    both = pd.concat([table, table.assign(seed=1, new=table.new + 0.08)])
    found = sfa.retained(both, 0.78)
    assert found["SFA p = 0.25"].tolist() == pytest.approx([0.74, 0.9]), "where it does not reach, its nearer end"
    assert found["WiSE-FT (p = 1)"].tolist() == [0.1, 0.1]


def test_settings_are_chosen_on_other_seeds():
    acc = {"a": [0.9, 0.1, 0.2], "b": [0.3, 0.4, 0.5], "c": [0.0, 0.0, 0.7]}
    rows = [
        {"method": m, "seed": s, "acc": v, "line": "x" if m != "c" else "y"} for m in acc for s, v in enumerate(acc[m])
    ]
    found = sfa.elsewhere(pd.DataFrame(rows))
    assert found["x"].tolist() == [acc["b"][0], acc["a"][1], acc["a"][2]] and found["y"].tolist() == acc["c"]


def test_the_real_backbone_trains_its_last_block_behind_what_stays(monkeypatch):
    """The code path of the real scale on noise: one network in two parts, and its streams in the seed's order."""
    module = sys.modules["studies.sfa.real"]
    g = torch.Generator().manual_seed(0)
    part = Examples(torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(400) % 100)
    noise = Dataset("noise", part, part, tuple(map(str, range(100))))
    monkeypatch.setattr(module, "dataset", lambda name: noise)
    monkeypatch.setattr(module, "TRAIN", 3)
    monkeypatch.setattr(module, "TEST", 1)
    stream, held = module.stream(1), module.stream(1, held_out=True)
    assert (len(stream), len(held)) == (20, 10) and stream[0].classes == held[0].classes != module.stream(2)[0].classes
    assert torch.equal(stream[0].train.x, held[0].train.x) and not torch.equal(stream[0].test.x, held[0].test.x)
    raw, whole = data.split(noise, 1), models.efficientnet_lite0(data.split(noise, 1), size=64, seed=5).eval()
    lower, upper = module._halves(5)
    x = raw[0].prepare(part.x[:4])
    with torch.no_grad():
        assert torch.allclose(upper.eval()(lower.eval()(x)), whole(x), atol=1e-4)
    rule = sfa.real().methods["SFA p=0.25"].consolidation
    few, training = replace(held, tasks=held.tasks[:2]), Training(2, 8, 1e-3, labels="task")
    result = run(few, module.upper, None, rule, training, progress=False)
    still = [n for n, t in result.weights[1].items() if torch.equal(t, result.weights[0][n])]
    assert result.reports[1]["steps"] == [1, 2, 3, 4] and still and all("bn" in n or n.startswith("2.") for n in still)


def test_an_advantage_is_paired():
    old = {"a": [0.6, 0.71, 0.82], "b": [0.5, 0.6, 0.7]}
    rows = [{"line": line, "seed": s, "old": value} for line, values in old.items() for s, value in enumerate(values)]
    found = contrasts(pd.DataFrame(rows), [("a", "b")], "old", column="line").loc["a", "b"]
    half = 4.302653 * 0.01 / 3**0.5
    assert found.tolist()[:4] == pytest.approx([0.11, 0.11 - half, 0.11 + half, 3]) and found.verdict == "gains"


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
    table = pd.DataFrame(sfa.merges(0))
    assert table.number.tolist() == [1, 2, 3, 4] and (table.barrier >= -1e-6).all()
    assert (table.old_after >= table.old_before - 0.02).all() and (table.new_after <= table.new_before + 0.02).all()


def test_the_sawtooth_has_both_sides_of_every_merge():
    training = Training(epochs=2, batch=32, lr=0.1, labels="task")
    for rule, merges in {None: 0, SFA(0.5): 2}.items():
        result = run(sfa.even_odd(), sfa.small_mlp, None, rule, training, watch=10, progress=False)
        table = result.trajectory()
        counts = table[table.task == 0].groupby("when").size()
        assert counts.get("before", 0) == counts.get("after", 0) == merges


def test_contradiction_turns_gradients_against_each_other():
    none, whole = (sfa.contradiction(0, conflict) for conflict in (0.0, 1.0))
    assert whole["start"] < 0 < none["start"] and all(abs(v) <= 1 for v in [*none.values(), *whole.values()])


def test_costs_are_counted():
    table = sfa.costs(parameters=1000, example=65, rows=100, tasks=3, steps=20, batch=10, p=0.25)
    assert table.kept["SFA p=0.25"] == 4000 and table.kept["EWC"] == 8000 and table.kept["task arithmetic"] == 16000
    assert table.kept["buffer 10%"] == 2 * 10 * 65 and table.flops["buffer 10%"] == 0
    assert table.flops["SFA p=0.25"] == 3 * 1000 * 4 * 2 and table.moved["WiSE-FT"] == 12000 * 2
    assert table.flops_share["L2"] == pytest.approx(3 * 1000 * 20 * 2 / (3 * 20 * 10 * 6 * 1000))


def test_a_pretrained_transformer_keeps_its_body_and_gets_a_fresh_head(monkeypatch):
    from studies.sfa import images

    stream = sfa.twenty(0)
    body = {n: t + 1 for n, t in images.weights.get_weights(images._vit(stream, seed=9)).items()}
    monkeypatch.setattr(images, "_body", lambda: body)
    net = images.weights.get_weights(sfa.pretrained(stream, seed=3))
    fresh = images.weights.get_weights(images._vit(stream, seed=3))
    for name, tensor in net.items():
        assert torch.equal(tensor, fresh[name] if name.startswith("linear.") else body[name]), name


@pytest.mark.packs("mnist")
def test_real_mnist_even_then_odd_on_one_plane(packs, monkeypatch, tmp_path):
    """Each of the plane's kinds of method once, on few images: both ends of the trade are where they should be."""
    monkeypatch.setenv("CLKIT_DATA", str(packs))
    chosen = {"fine-tuning": Learner(), "SFA p=0.25 β=0.5": (Learner(), SFA(0.25, 0.5)), "L2 λ=0.3": L2(0.3)}
    chosen |= {"SFA p=1 β=0.3": (Learner(), SFA(1.0, 0.3)), "EWC λ=30": EWC(30.0), "buffer": DataBuffer(0.1, "half")}
    stream = sfa.even_odd(0, "mnist", "shared", limit=80)
    table = sweep(
        stream,
        sfa.small_mlp,
        chosen,
        training=Training(15, 32, 0.1),
        measure=sfa.ends,
        jobs=1,
        progress=False,
        store=tmp_path,
    )
    found = table.set_index("method")[["old", "new"]]
    plain = found.loc["fine-tuning"]
    for name in list(chosen)[1:]:
        assert found.old[name] > plain.old + 0.02 and found.new[name] <= plain.new + 0.05, name
    assert found.old["SFA p=0.25 β=0.5"] == found.old.max()

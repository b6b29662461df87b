"""CLeWI's experiments: what the grids hold, what was published, and what is made of a table."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import toys
from clkit.consolidation import CLeWI
from clkit.learners import ER, MemoryOnly, Sum
from clkit.training import Result, Training
from studies import clewi

WHOLE = {"main": clewi.main, "lengths": clewi.lengths, "small": lambda profile: clewi.small(profile, {"ER": ER(50)})}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("profile", ["fast", "paper"])
def test_a_comparison_is_its_own_record(name, profile):
    whole = WHOLE[name](profile)
    record = json.loads(json.dumps(whole.config))
    assert record == WHOLE[name](profile).config
    assert record["methods"].keys() == whole.methods.keys() and len(whole.seeds) >= 3
    assert (record["streams"][0].split(",")[0] in ("digits", "letters")) == (profile == "fast")


def test_lengths_and_widths_are_settings():
    sources = clewi.lengths("fast").streams.values()
    assert [len(source(0)) for source in sources] == [s.keywords["tasks"] for s in sources] == [5, 10, 20]
    stream = toys.images()
    sizes = [sum(p.numel() for p in clewi.wide(k)(stream).parameters()) for k in (1, 2, 4)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_the_papers_table_has_its_pairs_at_its_settings():
    grid = clewi.main("paper", "cifar100")
    assert set(grid.methods) | {"joint"} == set(clewi.released().loc["cifar100"].index)
    pair = grid.methods["ER + CLeWI"]
    assert pair.consolidation == CLeWI(0.5) and pair.training == replace(grid.training, lr=0.1)
    assert grid.methods["SI"].training.lr == 0.01 and list(grid.seeds) == [43, 44, 45, 46, 47]
    assert grid.training.epochs == 50 and grid.training.rate(44, 50) == pytest.approx(0.1)


def test_settings_are_each_datasets_own():
    def of(name):
        grids = [clewi.main("paper", dataset).methods[name] for dataset in clewi.DATASETS]
        return [m.learner.others[0] if isinstance(m.learner, Sum) else m.learner for m in grids], grids[0].training

    assert [rule.strength for rule in of("online EWC")[0]] == [10, 20, 25]
    assert [(rule.strength, rule.xi) for rule in of("SI")[0]] == [(0.5, 1), (10, 1e-4), (0.5, 1)]
    assert [(rule.alpha, rule.beta) for rule in of("DER++")[0]] == [(0.2, 0.5), (0.1, 0.5), (0.2, 0.5)]
    assert [(rule.alpha, rule.beta) for rule in of("DER++ + CLeWI")[0]] == [(0.1, 0.1)] * 3
    assert [rule.fit_epochs for rule in of("GDumb")[0]] == [256, 250, 256]
    assert {(rule.weighting, rule.bias_epochs) for name in ("BiC", "BiC + CLeWI") for rule in of(name)[0]} == {
        ("mammoth", 250)
    }
    assert of("iCaRL")[1].weight_decay == 1e-5 and of("ER")[1].weight_decay == 0


@pytest.mark.parametrize("profile", ["fast", "paper"])
def test_joint_training_is_one_run_of_one_task(profile):
    whole = clewi.joint(profile)
    assert [source.keywords["tasks"] for source in whole.streams.values()] == [1]
    assert list(whole.methods) == ["joint"] and len(whole.seeds) == 5
    settings = {"paper": (0.03, "constant"), "fast": (0.1, "cosine")}
    assert (whole.training.lr, whole.training.schedule) == settings[profile]
    one = toys.quick(toys.stream(tasks=1)).summary()
    assert one["forgetting"] == 0 and one["acc"] > 0.9


def test_learning_rates_are_the_same_with_and_without_merging_at_a_laptops_scale():
    methods = clewi.main("fast").methods
    for name, method in methods.items():
        assert method.training == methods[name.split(" + ")[0]].training


def test_pairs_of_the_fast_table_have_one_alpha_and_the_papers_and_those_of_ewc_its_strengths():
    pairs = {n: m.consolidation for n, m in clewi.main("fast").methods.items() if m.consolidation}
    both = {f"{n} + paper's α": CLeWI(clewi.chosen("alpha", n)) for n in clewi.PAIRS if n not in ("ER", "ER-ACE")}
    assert pairs == both | {f"{n} + CLeWI": CLeWI(0.3) for n in clewi.PAIRS}
    grid = clewi.constrained((0, 3)).methods
    assert list(grid) == ["EWC 0", "EWC 0 + CLeWI", "EWC 3", "EWC 3 + CLeWI"]
    assert grid["EWC 0"].learner == ER(50) and grid["EWC 3"].learner.others[0].strength == 3


def test_published_numbers_are_the_specs():
    table = clewi.released().loc["cifar10"]
    assert table.acc["ER"] == 0.5322 and table.acc["ER + CLeWI"] == 0.6280
    gain = table.acc["BiC + CLeWI"] - table.acc["BiC"]
    assert gain == pytest.approx(-0.1848)
    assert {n for n in clewi.PAIRS if table.acc[f"{n} + CLeWI"] < table.acc[n]} == {"ER-ACE", "BiC"}


def test_equal_bytes_are_the_bytes_of_a_second_network():
    grid = clewi.equal_bytes(50)
    parameters = sum(p.numel() for p in clewi.wide()(toys.images()).parameters())
    [sizes] = [[m.learner.memory for n, m in grid.methods.items() if "CLeWI" not in n]]
    assert sizes[0] == 50 and 4 * parameters / 65 < sizes[1] - 50 < 4 * parameters / 65 + 50


def table_of(gap, spread):
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(5):
        base = rng.uniform(0.4, 0.6)
        for name, acc in (("ER", base), ("ER + CLeWI", base + gap + spread * (seed - 2))):
            rows.append({"method": name, "seed": seed, "acc": acc, "forgetting": 1 - acc, "masked": 1 - acc})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("gap", "verdict"), [(0.1, "gains"), (-0.1, "loses"), (0.005, "open")])
def test_gains_are_paired_and_judged_by_their_interval(gap, verdict):
    row = clewi.gains(table_of(gap, 0.01)).loc["ER"]
    assert row.gain == pytest.approx(gap) and row.verdict == verdict
    assert row.less == pytest.approx(gap) and row.masked == pytest.approx(-gap)
    half = 2.776445 * np.std([-0.02, -0.01, 0, 0.01, 0.02], ddof=1) / 5**0.5
    assert row.upper - row.gain == pytest.approx(half) == row.gain - row.lower
    assert row.cifar10 == pytest.approx(0.0958)


def test_effects_choose_on_other_seeds_and_take_the_lesser_of_two():
    accs = {"a": [0.5, 0.5, 0.9], "b": [0.6, 0.6, 0.1], "end": [0.4, 0.5, 0.6]}
    rows = [
        {"method": name, "seed": seed, "acc": acc, "forgetting": acc / 2, "last": acc / 4, "masked": acc}
        for name, values in accs.items()
        for seed, acc in enumerate(values)
    ]
    table = pd.DataFrame(rows)
    assert clewi.inside(["a", "b"], ["end"])(table) == pytest.approx({0: 0.1, 1: 0.0, 2: -0.5})
    assert clewi.traded("a", "end")(table).tolist() == pytest.approx([0.025, 0, 0.075])
    assert clewi.traded("end", "a")(table).tolist() == pytest.approx([-0.05, 0, -0.15])
    pair = table.replace({"a": "ER", "b": "ER + CLeWI"})
    assert clewi.added("ER", value="forgetting")(pair).tolist() == pytest.approx([0.05, 0.05, -0.4])


def test_plasticity_is_nothing_where_nothing_moved():
    still = toys.quick(toys.images(), model=toys.small_convnet, training=Training(epochs=0, batch=8))
    found = clewi.plasticity(still)
    assert found["weight_change"] == pytest.approx(0, abs=1e-6) and found["fisher_trace"] > 0


def test_plasticity_measures_the_way_gone_in_a_task():
    result: Result = toys.quick(toys.images(), MemoryOnly(memory=12), CLeWI(0.4), model=toys.small_convnet)
    names = [n for n, _ in result.model.named_parameters()]
    ways = []
    for t in (1, 2):
        old, new = (torch.cat([w[n].flatten() for n in names]) for w in (result.weights[t - 1], result.trained[t]))
        ways.append(((new - old).norm() / old.norm()).item())
    found = clewi.plasticity(result)
    assert found["weight_change"] == pytest.approx(np.mean(ways), rel=1e-4) and found["alpha"] == 0.4

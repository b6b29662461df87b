"""Math, Law, Code: what the grids hold, what is read off a run, and what a network goes on to write."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from clkit import data, models, plotting, run
from clkit.evaluation import exact_match
from clkit.training import Training
from clkit.weights import equal, get_weights
from studies import sfa
from studies.sfa import language

GRIDS = {
    "three domains": sfa.three_domains,
    "from base": sfa.from_base,
    "orders": sfa.orders,
    "real": sfa.real_texts,
    "aligned": sfa.aligned,
    "aligned text": sfa.aligned_text,
}
SHORT = Training(epochs=1, batch=32, lr=0.002, optimizer="adamw")


@pytest.fixture
def small(monkeypatch):
    """A few windows of every domain, in place of the experiments' thousands."""
    made = {name: data.texts(name, context=sfa.CONTEXT, limit=64, test_limit=8) for name in sfa.DOMAINS}
    monkeypatch.setattr(language, "text", lambda name, *, real=False, windows=0: made[name])
    return data.domains(made)


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_is_its_own_record_and_needs_no_data(name, monkeypatch):
    monkeypatch.delenv("CLKIT_DATA", raising=False)
    grid = GRIDS[name]()
    record = json.loads(json.dumps(grid.config))
    assert record == GRIDS[name]().config and record["methods"].keys() == grid.methods.keys()
    assert "object at" not in str(record) and "/" not in "".join(record["streams"])


def test_orders_are_all_and_real_texts_wait_for_the_run(monkeypatch, tmp_path):
    assert len(sfa.orders().streams) == 6 and "code, math, law" in sfa.orders().streams
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    [make] = sfa.real_texts().streams.values()
    with pytest.raises(ValueError, match=r"text\.zip"):
        make(0)


def test_a_stream_has_the_domains_in_their_order(small):
    stream = sfa.orders().streams["code, math, law"](0)
    assert [task.name for task in stream] == ["code", "math", "law"] and stream.shape == (sfa.CONTEXT,)
    assert stream.scenario == "domain" and len(stream.classes) == 256


def test_reading_is_of_the_last_row(small):
    result = run(small, models.gpt, training=SHORT, progress=False)
    found = sfa.reading(result)
    bits = np.array(found["bits"])
    assert np.allclose(bits, result.losses / np.log(2)) and len(found["exact"]) == 3
    assert found["mean_bits"] == pytest.approx(bits[2].mean()) and found["new_bits"] == bits[2, 2]
    assert found["old_bits"] == pytest.approx(bits[2, :2].mean())
    assert sfa.reading(result, sums=False)["exact"] == []


def test_final_bits_go_by_domain_whatever_the_order():
    grid = sfa.orders()
    names = ["fine-tuning", "SFA p=0.25 β=0.5", "SFA p=1 β=0.5"]
    bits = [[9.0, 9.0, 9.0], [9.0, 9.0, 9.0], [3.0, 1.0, 2.0]]
    table = pd.DataFrame(
        {"method": names, "stream": "code, math, law", "bits": [bits] * 3, "exact": [[0.1, 0.9, 0.3]] * 3}
    )
    found = sfa.final_bits(table, grid)
    assert (found.code == 3).all() and (found.math == 1).all() and (found.law == 2).all()
    assert (found.once == 0.9).all() and (found.sums == 0.3).all()
    assert found.line.tolist() == ["fine-tuning", "SFA p = 0.25", "WiSE-FT (p = 1)"] and found.beta[2] == 0.5


def test_final_bits_name_every_line_of_the_main_grid_and_leave_sums_out_where_not_asked_for():
    grid = sfa.three_domains()
    table = pd.DataFrame({"method": list(grid.methods), "stream": "math, law, code, real texts"})
    table["bits"], table["exact"] = [[[1.0, 2.0, 3.0]]] * len(table), [[]] * len(table)
    found = sfa.final_bits(table, grid).set_index("method")
    assert {"SFA p = 0.1", "WiSE-FT (p = 1)", "L2", "EWC", "buffer", "TIES", "joint"} < set(found.line)
    assert found.line["WiSE-FT from the base"] == "WiSE-FT from the base" and found.sums.isna().all()


def test_what_it_writes_is_what_exact_match_counts(small):
    training = replace(SHORT, epochs=60, lr=0.005)
    one = replace(small, tasks=small.tasks[:1])
    result, text = run(one, models.gpt, training=training, progress=False), language.text("math")
    known = [bytes(text.train.x[i].tolist()).decode().partition(":")[0] + ":" for i in range(8)]
    written = sfa.writes(result, known).loc[0]
    sums = {prompt: str(eval(prompt[:-1])) for prompt in known}
    assert sum(written[prompt].endswith("#" + answer) for prompt, answer in sums.items()) >= 4
    problems = [data.Problem(prompt, f"#{answer}".ljust(23) + "\n", "#") for prompt, answer in sums.items()]
    right = sum(p.answer_in(written[p.prompt] + "\n") == p.answer for p in problems)
    assert exact_match(result.model, replace(text, problems=tuple(problems))) == right / len(problems)


def test_it_stops_at_the_length(small):
    result = run(small, models.gpt, training=SHORT, progress=False)
    written = sfa.writes(result, ["def "], length=5)
    assert written.shape == (3, 1) and all(len(text.encode()) <= 15 for text in written["def "])
    long = "0123456789" * 4 + "def f(x):"
    seen = []
    result.model.register_forward_pre_hook(lambda _, args: seen.append(bytes(args[0][0].tolist()).decode()))
    sfa.writes(result, [long], length=1)
    assert set(seen) == {long[-sfa.CONTEXT :]}


def test_the_well_read_network_has_read_what_no_stream_has(monkeypatch):
    made = {name: data.texts(name, context=sfa.CONTEXT, limit=96, test_limit=8) for name in sfa.DOMAINS}
    seen = []
    monkeypatch.setattr(language, "WINDOWS", 64)
    monkeypatch.setattr(language, "text", lambda name, *, windows=0: made[name])
    monkeypatch.setattr(language, "run", lambda stream, *a, **k: seen.append(stream) or run(stream, *a, **k))
    stream = data.domains(made)
    language._well_read.cache_clear()
    first = sfa.well_read(stream, seed=3)
    assert torch.equal(seen[0][0].train.x, torch.cat([one.train.x[64:] for one in made.values()]))
    assert not equal(get_weights(first), get_weights(models.gpt(stream, seed=3)))
    assert equal(get_weights(first), get_weights(sfa.well_read(stream, seed=3))) and len(seen) == 1
    language._well_read.cache_clear()


def test_barriers_know_one_network_from_two(small, monkeypatch):
    monkeypatch.setattr(language, "ADAM", SHORT)
    table = sfa.barriers(seeds=(0,))
    assert table.groupby(["pair", "matching"]).size().eq(11).all() and len(table) == 66
    ends = table[table.t.isin([0.0, 1.0])].pivot_table(index=["pair", "t"], columns="matching", values="bits")
    assert np.allclose(ends[["weights", "activations"]], ends[["none", "none"]], atol=1e-3)
    assert (table[table.matching == "none"].identity == 1).all() and (table.identity <= 1).all()


def test_bits_run_backwards():
    import matplotlib.pyplot as plt

    table = pd.DataFrame({"line": "L2", "seed": [0, 1, 0, 1], "strength": [1, 1, 2, 2]})
    table["old_bits"], table["new_bits"] = [4.0, 6.0, 2.0, 2.0], [3.0, 3.0, 5.0, 5.0]
    with plotting.style():
        fig, ax = plt.subplots()
        plotting.frontier(ax, table, {"L2": "strength"}, x="new_bits", y="old_bits", by="line")
        assert ax.xaxis_inverted() and ax.yaxis_inverted() and "bits" in ax.get_xlabel()
        assert np.allclose(ax.lines[0].get_xydata(), [[3, 5], [5, 2]])
        plt.close(fig)

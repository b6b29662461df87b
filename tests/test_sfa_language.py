"""Math, Law, Code: what the grids hold, what is read off a run, and what a network goes on to write."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from clkit import data, models, plotting, run
from clkit.experiments import Comparison, Method
from clkit.language import exact_match
from clkit.learners import Learner
from clkit.training import Training
from clkit.weights import equal, get_weights
from studies import sfa
from studies.sfa import language

SHORT = Training(epochs=1, batch=32, lr=0.002, optimizer="adamw")


@pytest.fixture
def small(monkeypatch):
    """A few windows of every domain, in place of the experiments' thousands."""
    made = {name: data.texts(name, context=sfa.CONTEXT, limit=64, test_limit=8) for name in sfa.DOMAINS}
    monkeypatch.setattr(language, "text", lambda name, *, real=False, windows=0: made[name])
    return data.domains(made)


def test_orders_are_kept_and_real_texts_wait_for_the_run(small, monkeypatch, tmp_path):
    stream = sfa.texts(0, order=("code", "math", "law"))
    assert [task.name for task in stream] == ["code", "math", "law"] and stream.shape == (sfa.CONTEXT,)
    assert stream.scenario == "domain" and len(stream.classes) == 256
    monkeypatch.undo()
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"text\.zip"):
        sfa.texts(0, real=True)


def test_reading_is_of_the_last_row(small):
    result = run(small, models.gpt, training=SHORT, progress=False)
    found = sfa.reading(result)
    bits = np.array(found["bits"])
    assert np.allclose(bits, result.losses / np.log(2)) and len(found["exact"]) == 3
    assert found["mean_bits"] == pytest.approx(bits[2].mean()) and found["new_bits"] == bits[2, 2]
    assert found["old_bits"] == pytest.approx(bits[2, :2].mean())
    assert sfa.reading(result, sums=False)["exact"] == []


@pytest.fixture
def whole():
    """Two orders, of which nothing is trained."""
    streams = {"backwards": partial(sfa.texts, order=("code", "math", "law")), "as it is": sfa.texts}
    return Comparison(streams, {"gpt": models.gpt}, {"fine-tuning": Method(Learner())}, SHORT, range(1), sfa.reading)


def test_final_bits_go_by_domain_whatever_the_order(whole):
    bits = [[9.0, 9.0, 9.0], [9.0, 9.0, 9.0], [3.0, 1.0, 2.0]]
    table = pd.DataFrame({"stream": ["backwards", "as it is"], "bits": [bits] * 2, "exact": [[0.1, 0.9, 0.3]] * 2})
    found = sfa.final_bits(table, whole)
    assert found[["math", "law", "code"]].to_numpy().tolist() == [[1, 2, 3], [3, 1, 2]]
    assert found.once.tolist() == [0.9, 0.1] and (found.sums == 0.3).all()


def test_final_bits_leave_sums_out_where_not_asked_for(whole):
    table = pd.DataFrame({"stream": ["as it is"], "bits": [[[1.0, 2.0, 3.0]]], "exact": [[]]}, index=[7])
    found = sfa.final_bits(table, whole)
    assert found.code[7] == 3 and found.sums.isna().all() and found.once.isna().all()


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
    table = pd.DataFrame(sfa.barriers(0))
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

"""Math, Law, Code: what the grids hold, what is read off a run, and what a network goes on to write."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from clkit import data, models, plotting, run
from clkit.language import exact_match
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


def test_seeds_order_and_draw_and_real_texts_wait_for_the_run(small, monkeypatch, tmp_path):
    monkeypatch.setattr(language, "WINDOWS", 40)
    orders = {tuple(task.name for task in sfa.texts(seed)) for seed in range(6)}
    assert orders == set(sfa.ORDERS) and sfa.ORDERS[0] == sfa.DOMAINS
    stream, other = (sfa.texts(seed, order=("code", "math", "law")) for seed in (0, 1))
    assert [task.name for task in stream] == ["code", "math", "law"] and stream.shape == (sfa.CONTEXT,)
    assert len(stream[0].train) == 40 and not torch.equal(stream[0].train.x, other[0].train.x)
    assert stream.scenario == "domain" and len(stream.classes) == 256
    monkeypatch.undo()
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"text\.zip"):
        sfa.texts(0, real=True)


def test_reading_is_of_the_last_row_and_goes_by_domain(small):
    result = run(small, models.gpt, training=SHORT, progress=False)
    found = sfa.reading(result)
    assert np.allclose(found["bits"], result.losses[-1] / np.log(2))
    assert found["mean_bits"] == pytest.approx(np.mean(found["bits"])) and found["new_bits"] == found["bits"][2]
    assert found["old_bits"] == pytest.approx(np.mean(found["bits"][:2]))
    table = sfa.by_domain(pd.DataFrame({"seed": [0, 5], "bits": [[1.0, 2.0, 3.0]] * 2}))
    assert table[["math", "law", "code"]].to_numpy().tolist() == [[1, 2, 3], [3, 2, 1]]


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
    monkeypatch.setattr(language, "POOL", 64)
    monkeypatch.setattr(language, "text", lambda name, *, windows=0: made[name])
    monkeypatch.setattr(language, "run", lambda stream, *a, **k: seen.append(stream) or run(stream, *a, **k))
    stream = data.domains(made)
    language._well_read.cache_clear()
    first = sfa.well_read(stream, seed=3)
    assert torch.equal(seen[0][0].train.x, torch.cat([one.train.x[64:] for one in made.values()]))
    assert not equal(get_weights(first), get_weights(language.small_gpt(stream, seed=3)))
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

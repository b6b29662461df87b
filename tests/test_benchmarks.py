"""The measurements of speed: each runs, once and small, and a naive way computes what ours does; no time is judged."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from clkit import benchmarks, curvature
from clkit.merging import ties

ROOT = Path(__file__).parent.parent
PEERS = {"Avalanche", "BackPACK", "FusionBench", "mergekit"}


@pytest.mark.parametrize("name", benchmarks.benchmarks())
def test_every_benchmark_runs_and_says_which_peers_are_missing(name, monkeypatch):
    monkeypatch.setattr(benchmarks, "peer", lambda name: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    threads, rows = torch.get_num_threads(), benchmarks.benchmarks()[name](turns=1, share=0.01)
    assert rows and torch.get_num_threads() == threads
    for row in rows:
        assert row["name"] == f"{row['what']}, {row['case']} / {row['against']}"
        assert (row["theirs"] is None) == (row["ratio"] is None) == (row["against"] in PEERS)
        assert row["ours"] >= 0 and (row["theirs"] or 0) >= 0


def test_a_ratio_is_theirs_over_ours_and_a_measure_in_two_places_is_taken_once():
    taken = []
    naive = lambda: taken.append(0) or [6.0, 9.0, 30.0][len(taken) - 1]  # noqa: E731
    ways = {("a", "clkit"): lambda: 3.0, ("a", "plain"): naive, ("a", "peer"): None, ("b", "clkit"): lambda: 1.0}
    rows = benchmarks.compare("sum", {**ways, ("b", "plain"): naive}, turns=3)
    assert [(row["case"], row["against"], row["ratio"]) for row in rows] == [
        ("a", "plain", 3.0), ("a", "peer", None), ("b", "plain", 9.0),
    ]  # fmt: skip
    assert len(taken) == 3


@pytest.mark.parametrize("net", ["perceptron", "convnet"])
def test_the_naive_squares_are_the_fisher_information(net):
    factory, shape, *_ = benchmarks.NETS[net]
    task = benchmarks.noise(6, shape)[0]
    parts = factory(benchmarks.noise(6, shape)).eval(), task.prepare(task.train.x), task.train.y
    ours = curvature.fisher(parts[0], parts[1], labels="true", y=parts[2])
    peers = [benchmarks.squares_by_backpack] if benchmarks.peer("backpack") else []
    for way in (benchmarks.squares_by_loop, benchmarks.squares_by_vmap, *peers):
        torch.testing.assert_close(dict(zip(ours, way(*parts), strict=True)), ours, rtol=1e-4, atol=1e-9)


def test_the_naive_merge_by_sorting_is_ties():
    g = torch.Generator().manual_seed(0)
    base, *ws = ({"a.weight": torch.randn(30, 40, generator=g)} for _ in range(6))
    ours = ties(ws, base=base, density=benchmarks.DENSITY)
    torch.testing.assert_close(benchmarks.as_one_vector(benchmarks.by_sorting, ws, base), ours)


def test_there_are_13_prefixes_and_each_is_part_of_the_network():
    x = torch.randn(2, 3, 8, 8)
    net = benchmarks.models.resnet18(benchmarks.noise(2, (3, 8, 8)), 2).eval()
    assert isinstance(net, nn.Sequential)
    places = [prefix(x) for prefix in benchmarks.prefixes(net)]
    assert len(places) == 13 and [len(place[0]) for place in places[::3]] == [2, 2, 4, 8, 16]
    torch.testing.assert_close(places[-1], net[:-3](x))


def rows_of(name: str, ratio: float | None) -> list[dict]:
    row = {"name": "n", "what": name, "case": "small", "against": "plain code", "unit": "seconds", "ours": 1.0}
    return [{"benchmark": name, **row, "theirs": ratio, "ratio": ratio}]


def test_a_record_replaces_the_rows_of_its_benchmarks_alone(tmp_path):
    readme = tmp_path / "clkit" / "README.md"
    readme.parent.mkdir()
    readme.write_text(f"before\n{benchmarks.BEGIN}{benchmarks.END}after\n")
    benchmarks.record([*rows_of("merging", 2.0), *rows_of("fisher", None)], tmp_path)
    benchmarks.record(rows_of("merging", 0.5), tmp_path)
    whole = json.loads((tmp_path / "figures" / "bench.json").read_text())
    assert {name: part["rows"] for name, part in whole.items()} == {
        "merging": rows_of("merging", 0.5),
        "fisher": rows_of("fisher", None),
    }
    assert "torch" in whole["fisher"]["versions"] and re.fullmatch(r"\d{4}-\d\d-\d\d", whole["fisher"]["date"])
    text = readme.read_text()
    assert text == f"before\n{benchmarks.BEGIN}{benchmarks.table(whole)}{benchmarks.END}after\n"
    assert "| fisher | plain code | small not installed |\n| merging | plain code | small 0.50 |" in text


def test_the_readme_shows_all_that_was_recorded():
    whole = json.loads((ROOT / "figures" / "bench.json").read_text(encoding="utf-8"))
    assert whole.keys() == benchmarks.benchmarks().keys()
    text = (ROOT / "clkit" / "README.md").read_text(encoding="utf-8")
    assert text.count(benchmarks.BEGIN + benchmarks.table(whole) + benchmarks.END) == 1
    assert benchmarks.table(whole).count("| ") and len(benchmarks.table(whole).splitlines()) <= 24

"""What stored results depend on: code by definition, data by source; which are stale, kept, or come out alike."""

import importlib
import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from clkit import models
from clkit.cli import main
from clkit.experiments import Comparison, Method, page, provenance, study
from clkit.experiments.provenance import MISSING, Code
from clkit.learners import ER, ERACE, EWC
from clkit.training import Training

STUDIED = '''
"""A study."""
from functools import partial
from clkit import data
from helping import shared, other

SCALE = 2

def half(seed, p=(1,)):
    """Half of it."""
    return {"half": shared(seed + 1) / SCALE, "one": 1}  # a comment

def third(seed):
    return {"third": other(seed) / 3}

def digits(seed):
    return data.split(data.digits(), 5, order=seed)

def split(seed):
    return data.split(data.digits(), 2, order=seed)
'''
HELPING = "def shared(x):\n    return x\n\ndef other(x):\n    return x\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository with two modules of its own, `studied` and `helping`, which can be edited and read anew."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.syspath_prepend(str(tmp_path / "notebooks"))
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    monkeypatch.delenv("CLKIT_PROFILE", raising=False)
    monkeypatch.delenv("CLKIT_FIGURES", raising=False)
    edit(tmp_path, "helping", HELPING)
    edit(tmp_path, "studied", STUDIED)
    yield tmp_path
    for name in ("helping", "studied", "folder", "folder.inner"):
        sys.modules.pop(name, None)


def edit(place, name, text, old="", new=""):
    """Writes a module, with `new` for `old`, and imports it anew."""
    assert old in text
    (place / "notebooks" / f"{name}.py").write_text(text.replace(old, new))
    for known in ("helping", "studied"):
        sys.modules.pop(known, None)
    importlib.invalidate_caches()


def studied():
    sys.dont_write_bytecode = True
    return importlib.import_module("studied")


def stale(place):
    return provenance.stale((), place)


def test_code_is_followed_by_definition_through_packages_that_hand_it_on(place):
    found = Code(place).reached(["clkit.learners.ER", "studied.half"])
    assert {("clkit.learners.rehearsal", "ER"), ("studied", "half"), ("studied", "SCALE")} <= found
    assert ("helping", "shared") in found and ("helping", "other") not in found and ("studied", "third") not in found
    assert not any(
        module.startswith(("clkit.store", "clkit.experiments", "clkit.learners.exemplars")) for module, _ in found
    )
    assert Code(place).reached(["torch.nn.Linear", "studied.none"]) == set()


@pytest.mark.parametrize(
    ("name", "text", "old", "new", "matters"),
    [
        ("studied", STUDIED, "Half of it", "A half", False),
        ("studied", STUDIED, "# a comment", "", False),
        ("studied", STUDIED, "/ SCALE,", "\\\n        / SCALE,", False),
        ("studied", STUDIED, "/ 3", "/ 4", False),
        ("helping", HELPING, "def other(x):\n    return x", "def other(x):\n    return 2 * x", False),
        ("studied", STUDIED, "SCALE = 2", "SCALE = 4", True),
        ("helping", HELPING, "def shared(x):\n    return x", "def shared(x):\n    return 2 * x", True),
    ],
)
def test_a_result_is_stale_by_the_code_that_it_uses_alone(place, name, text, old, new, matters):
    page("03-x").table(study(studied().half, range(2)), "halves")
    assert stale(place) == {}
    edit(place, name, text, old, new)
    assert stale(place) == ({"03-x-halves-runs": [f"notebooks/{name}.py"]} if matters else {})


INNER = """
import sys

def twice(x):
    return 2 * x

if sys.version_info >= (3, 11):
    def late(x):
        return 3 + x

class Kind:
    size = 4

Kind.size = 5
SIZES = {}
SIZES["a"] = 7
named, table = lambda x: 8 + x, {"a": lambda x: 9 + x}
"""


@pytest.mark.parametrize(
    ("imports", "used", "old"),
    [
        ("from folder.inner import *", "twice(seed)", "2"),
        ("import folder.inner", "folder.inner.twice(seed)", "2"),
        ("import folder", "folder.public(seed)", "2"),
        ("from folder.inner import twice\ndef other():\n    from helping import other as twice", "twice(seed)", "2"),
        ("from folder.inner import late", "late(seed)", "3"),
        ("from folder.inner import Kind", "Kind.size", "5"),
        ("from folder.inner import SIZES", "SIZES['a']", "7"),
        ("from folder.inner import named", "named(seed)", "8"),
        ("from folder import inner\nunnamed = {'a': lambda seed: inner.twice(seed)}", "unnamed['a'](seed)", "2"),
    ],
)
def test_code_is_found_however_it_is_imported_or_set(place, imports, used, old):
    (place / "notebooks" / "folder").mkdir()
    (place / "notebooks" / "folder" / "__init__.py").write_text("from .inner import twice as public\n")
    (place / "notebooks" / "folder" / "inner.py").write_text(INNER)
    edit(place, "studied", f"{imports}\ndef half(seed):\n    return {used}\n")
    values = list(getattr(studied(), "unnamed", {"a": studied().half}).values())
    known = provenance.record(values, Code(place), "03-x")
    assert provenance.changes(known, Code(place)) == []
    (place / "notebooks" / "folder" / "inner.py").write_text(INNER.replace(old, "1"))
    assert provenance.changes(known, Code(place)) == ["notebooks/folder/inner.py"]


def test_a_lambda_of_a_file_counts(place):
    edit(place, "helping", INNER)
    helping = importlib.import_module("helping")
    known = provenance.record([helping.table], Code(place), "03-x")
    edit(place, "helping", INNER, "9", "1")
    assert provenance.changes(known, Code(place)) == ["notebooks/helping.py"]


def test_recording_keeps_a_stale_table_whose_run_comes_out_alike_and_computes_another_anew(place, monkeypatch):
    table = page("03-x").table(study(studied().half, range(3), p=[1, 2]), "halves")
    file = place / "figures" / "03-x-halves-runs.json"
    marked = json.loads(file.read_text())
    unmarked = json.loads(file.read_text())
    edit(place, "studied", STUDIED, "shared(seed + 1) / SCALE", "shared(seed + 1) * (1 / SCALE)")
    whole = study(studied().half, range(3), p=[1, 2])
    pd.testing.assert_frame_equal(page("03-x").table(whole, "halves"), table)
    assert stale(place)  # reading renews nothing
    monkeypatch.setenv("CLKIT_RECORD", "1")
    calls, whole_run = [], type(whole).run

    def run(self):
        calls.append(self)
        return whole_run(self)

    monkeypatch.setattr(type(whole), "run", run)
    pd.testing.assert_frame_equal(page("03-x").table(whole, "halves"), table)
    assert not stale(place) and [len(call.seeds) for call in calls] == [1] and len(calls[0].axes["p"]) == 1
    edit(place, "studied", STUDIED, "SCALE = 2", "SCALE = 4")
    whole = study(studied().half, range(3), p=[1, 2])
    assert page("03-x").table(whole, "halves").half.tolist() == [0.25, 0.5, 0.75] * 2
    assert not stale(place) and [len(call.seeds) for call in calls] == [1, 1, 3]
    del unmarked["provenance"]  # as results were stored before
    unmarked["data"] = json.loads(file.read_text())["data"]
    file.write_text(json.dumps(unmarked))
    assert stale(place) == {"03-x-halves-runs": [MISSING]}
    page("03-x").table(whole, "halves")
    assert not stale(place) and len(calls) == 4 and json.loads(file.read_text())["data"] != marked["data"]


def test_runs_are_computed_that_use_all_code_that_changed(place):
    methods = {"ER": Method(ER(5)), "more": Method(ER(9)), "ER-ACE": Method(ERACE(5)), "EWC": Method(EWC(1.0))}
    streams = {"s": studied().digits, "t": studied().split}
    whole = Comparison(streams, {"mlp": models.mlp}, methods, Training(), range(3))
    code = Code(place)
    for changed, names in {
        "clkit/models/networks.py": [("s", "ER")],
        "clkit/learners/rehearsal.py": [("s", "ER"), ("s", "ER-ACE")],
        "clkit/learners/anchored.py": [("s", "EWC")],
        "notebooks/studied.py": [("s", "ER"), ("t", "ER")],
        "clkit/learners/none.py": [("s", "ER")],
    }.items():
        runs = provenance.samples(whole, [changed], code, "03-x", 8)
        assert [(*run.streams, *run.methods) for run in runs] == names and runs[0].seeds == [2]
    axes = study(studied().half, range(3), p=[1, 2], by={"a": studied().third, "b": studied().half})
    points = provenance.samples(axes, ["notebooks/studied.py"], code, "03-x", 4)
    assert [(list(part.axes["p"]), list(part.axes["by"])) for part in points] == [([1], ["a"])]
    assert provenance.samples(axes, ["notebooks/helping.py"], code, "03-x", 1)[1].axes["by"].keys() == {"a"}
    facts = provenance.record([whole], code, "03-x")
    assert "notebooks/studied.py" in facts["code"] and "clkit/training/loop.py" in facts["code"]
    assert list(facts["data"]) == ["scikit-learn's digits"] and "clkit/alignment/matching.py" not in facts["code"]


def test_stale_results_are_listed_with_the_file_and_kept_with_a_reason(place, capsys):
    page("03-x", "real").table(study(studied().half, range(2)), "halves")
    page("03-x").results(lambda: studied().third(1), {}, "third", commit=True)
    assert main(["figures", "--stale"]) == 0 and capsys.readouterr().out == ""
    edit(place, "studied", STUDIED, "SCALE = 2", "SCALE = 4")
    assert main(["figures", "--stale"]) == 1
    told = capsys.readouterr()
    assert told.out == "03-x-halves-runs  notebooks/studied.py\n" and "clkit figures --write" in told.err
    assert main(["figures", "--keep", " "]) == 2 and "say in a sentence" in capsys.readouterr().err
    assert main(["figures", "--keep", "hours, and rounding alone", "03"]) == 0
    assert capsys.readouterr().out == "03-x-halves-runs\n"
    assert main(["figures", "--stale"]) == 0
    kept = json.loads((place / "figures" / "03-x-halves-runs.json").read_text())
    assert kept["provenance"]["kept"] == "hours, and rounding alone"
    kept["provenance"]["environment"]["torch"] = "1.0"
    (place / "figures" / "03-x-halves-runs.json").write_text(json.dumps(kept))
    assert main(["figures", "--stale"]) == 0 and main(["figures", "--stale", "--all"]) == 1
    assert "03-x-halves-runs  torch 1.0 there" in capsys.readouterr().out


def test_names_of_no_result_are_refused_and_a_cut_off_record_is_none(place, capsys):
    page("03-x").table(study(studied().half, range(2)), "halves")
    page("03-x").table(study(studied().half, range(3)), "more")
    for option in (["--stale"], ["--keep", "a reason"]):
        assert main(["figures", *option, "03", "notebooks/03-x.ipynb"]) == 2
        assert "names: no result begins with 'notebooks/03-x.ipynb'" in capsys.readouterr().err
    edit(place, "studied", STUDIED, "SCALE = 2", "SCALE = 4")
    file = place / "figures" / "03-x-more-runs.json"
    cut = json.loads(file.read_text())
    del cut["provenance"]["roots"], cut["provenance"]["environment"]
    file.write_text(json.dumps(cut))
    assert stale(place) == {"03-x-halves-runs": ["notebooks/studied.py"], "03-x-more-runs": [MISSING]}
    assert main(["figures", "--stale", "--all"]) == 1
    assert main(["figures", "--keep", "a reason"]) == 2 and "names: there are none" in capsys.readouterr().err
    assert main(["figures", "--all"]) == 2 and "--all: it goes with --stale" in capsys.readouterr().err
    assert main(["figures", "--keep", "a reason", "03"]) == 2
    assert "03-x-more-runs has no record" in capsys.readouterr().err
    assert "03-x-halves-runs" in stale(place)  # none is kept where not all can be


def test_a_pack_counts_by_its_bytes_where_it_is_at_hand(place, monkeypatch):
    text = STUDIED + "\ndef read(seed):\n    return len(data.load('shapes/some').train)\n"
    edit(place, "studied", text)
    monkeypatch.setenv("CLKIT_DATA", str(place / "packs"))
    (place / "packs" / "other").mkdir(parents=True)
    (place / "packs" / "shapes.zip").write_bytes(b"a")
    known = provenance.record([studied().read], Code(place), "03-x")
    assert list(known["data"])[-1:] == ["pack shapes"]
    assert provenance.changes(known, Code(place)) == []
    (place / "packs" / "shapes.zip").unlink()
    assert provenance.changes(known, Code(place)) == []
    (place / "packs" / "shapes.zip").write_bytes(b"bc")
    assert provenance.changes(known, Code(place)) == ["pack shapes"]


def test_packs_that_constants_name_and_files_of_settings_count(place, monkeypatch):
    own = "import tomllib\nfrom pathlib import Path\nSCALE = tomllib.loads(Path('own.toml').read_text())['a']"
    read = "PACK, MORE = '20-shapes.zip', 'other'\ndef read(seed):\n    return len(data.load(PACK + MORE).train)\n"
    edit(place, "studied", f"{STUDIED}\n{read}", "SCALE = 2", own)
    monkeypatch.chdir(place / "notebooks")
    monkeypatch.setenv("CLKIT_DATA", str(place))
    for name in ("20-shapes.zip", "other.zip", "notebooks/own.toml"):
        (place / name).write_text("a = 2")
    known = provenance.record([studied().read], Code(place), "03-x")
    assert list(known["data"])[-1:] == ["pack 20-shapes"]
    assert page("03-x").table(study(studied().half, range(2)), "halves").half.tolist() == [0.5, 1.0]
    (place / "notebooks/own.toml").write_text("a = 4")
    assert stale(place) == {"03-x-halves-runs": ["notebooks/own.toml"]}
    edit(place, "studied", (place / "notebooks/studied.py").read_text())
    monkeypatch.setenv("CLKIT_RECORD", "1")
    assert page("03-x").table(study(studied().half, range(2)), "halves").half.tolist() == [0.25, 0.5]
    assert stale(place) == {}


def test_a_notebooks_own_functions_count_by_name(place):
    cell = {"cell_type": "code", "source": ["%matplotlib inline\n", "def own(seed):\n", "    return {'x': seed}\n"]}
    book = place / "notebooks" / "03-x.ipynb"
    book.write_text(json.dumps({"cells": [cell]}))
    before = Code(place).facts(["03-x.own"])["code"]
    assert list(before) == ["notebooks/03-x.ipynb"]
    book.write_text(json.dumps({"cells": [cell, {"cell_type": "code", "source": "x = 1"}]}))
    assert Code(place).facts(["03-x.own"])["code"] == before
    book.write_text(json.dumps({"cells": [cell | {"source": "def own(seed):\n    return {'x': 2}\n"}]}))
    assert Code(place).facts(["03-x.own"])["code"] != before


def test_no_stored_result_is_stale():
    assert not provenance.stale((), Path(__file__).parents[1])

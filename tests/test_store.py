"""What tells two computations apart, for the sweep and for a checkpoint alike; and files and records."""

import copy
import functools
import importlib
import json
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import toys
from clkit import data, models, modulation, store
from clkit.consolidation import NoConsolidation
from clkit.experiments import sweep
from clkit.learners import ER, Learner
from clkit.store import Records, describe, digest, identity
from clkit.training import Training, run

SHORT = Training(epochs=1, batch=16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def mlp(**attributes: Any) -> nn.Module:
    net = models.mlp(toys.stream(2), hidden=(4,), seed=0)
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


class Own(nn.Module):
    """A module that is not installed, with anything as an attribute."""

    def __init__(self, thing: Any = None) -> None:
        super().__init__()
        self.net, self.thing = mlp(), thing

    def forward(self, x):
        return self.net(x)


def frozen(n: int) -> nn.Module:
    net = Own()
    net.net.linear.requires_grad_(n == 0)
    return net


def buffered(n: int, *, persistent: bool) -> nn.Module:
    net = Own()
    net.register_buffer("scale", torch.full((2,), float(n)), persistent=persistent)
    return net


def trained(n: int) -> nn.Module:
    net = Own()
    net.net.train(n == 0)
    return net


def nested(n: int) -> nn.Module:
    net = Own(Own())
    net.thing.gain = float(n)
    return net


def hooked(n: int) -> nn.Module:
    net = Own()
    vars(net)["handle"] = net.register_forward_hook(lambda module, args, out: out * (n + 1))
    return net


def parametrised(n: int) -> nn.Module:
    net = Own(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2), dim=n))
    for parameter in net.thing.parameters():
        nn.init.ones_(parameter)
    return net


def tied(n: int) -> nn.Module:
    net = Own(nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)]))
    for part in net.thing:
        nn.init.ones_(part.weight)
    net.thing[1].weight = net.thing[n].weight
    return net


def ordered(n: int) -> nn.Module:
    net = Own(nn.Sequential())
    for name in ("ab", "ba")[n]:
        net.thing.add_module(name, nn.ReLU() if name == "a" else nn.Tanh())
    return net


def made(**members: Any) -> Any:
    """A module of a class with these members."""
    return type("Made", (Own,), members)()


def drawing(n: int) -> Any:
    return torch.Generator().manual_seed(n)


class Slotted:
    __slots__ = ("n",)

    def __init__(self, n: int) -> None:
        self.n = n


class Named:
    """What has no description of its own but a fingerprint."""

    def __init__(self, n: int) -> None:
        self.lock, self.fingerprint = threading.Lock(), f"number {n}"

    def __deepcopy__(self, memo):
        return self


MODULES = {
    "frozen parts": frozen,
    "a buffer": lambda n: buffered(n, persistent=True),
    "a buffer that no state_dict has": lambda n: buffered(n, persistent=False),
    "a training flag": trained,
    "a plain attribute": lambda n: Own(0.5 + n),
    "an attribute of an installed module": lambda n: mlp(gain=n),
    "heads of a transformer": lambda n: models.vit(toys.images(), dim=8, depth=1, heads=n + 1, patch=2, seed=0),
    "an attribute of a module within": nested,
    "a hook": hooked,
    "a parametrisation": parametrised,
    "tied weights": tied,
    "the order of parts": ordered,
    "a class's attribute": lambda n: made(gain=n),
    "a class's list": lambda n: made(sizes=[1, n]),
    "a class's method": lambda n: made(forward=lambda self, x: self.net(x) * (n + 1)),
    "a class's property": lambda n: made(rate=property(lambda self: n)),
    "a class's class method": lambda n: made(rate=classmethod(lambda kind: n)),
    "a base class": lambda n: type("Made", (type("Base", (Own,), {"gain": n}),), {})(),
    "a list of tensors": lambda n: Own([torch.zeros(2), torch.full((2,), float(n))]),
    "a dict of arrays": lambda n: Own({"a": {1: np.arange(3) + n}}),
    "an array of objects": lambda n: Own(np.array([None, "a", n], dtype=object)),
    "a set": lambda n: Own({"a", "b", f"c{n}"}),
    "a tuple": lambda n: Own((1, (2, n))),
    "a dtype": lambda n: Own((torch.float32, torch.float64)[n]),
    "a lambda": lambda n: Own(((lambda x: x + 1), (lambda x: x + 2))[n]),
    "a lambda's capture": lambda n: Own(lambda x: x + n),
    "a partial": lambda n: Own(functools.partial(torch.add, alpha=n)),
    "a bound method": lambda n: Own(Slotted(n).__init__),
    "a function of an installed package": lambda n: Own((torch.relu, torch.tanh)[n]),
    "a generator": lambda n: Own(drawing(n)),
    "a generator of numpy": lambda n: Own(np.random.default_rng(n)),
    "an object with slots": lambda n: Own(Slotted(n)),
    "a thing with a fingerprint": lambda n: Own(Named(n)),
    "a memory layout": lambda n: Own(torch.ones(1, 2, 3, 4).contiguous(memory_format=LAYOUTS[n])),
}  # fmt: skip


def capturing(n: int):
    return lambda stream, seed: mlp(gain=n)


def by_default(n: int):
    def build(stream, seed=0, gain=n):
        return mlp(gain=gain)

    return build


def by_name(n: int):
    def build(stream, *, seed=0, gain=n):
        return mlp(gain=gain)

    return build


def cached(n: int):
    @functools.cache
    def gain():
        return n

    return lambda stream, seed: mlp(gain=gain())


def wrapped(n: int):
    @functools.wraps(mlp)
    def build(stream, seed):
        return mlp(gain=n)

    return build


def remarked(n: int):
    def build(stream, seed):
        return mlp(gain=vars(build)["gain"])

    vars(build)["gain"] = n
    return build


def deep(n: int):
    def build(stream, seed):
        def inner():
            return (lambda: n)()

        return mlp(gain=inner())

    return build


@dataclass(frozen=True)
class Building:
    gain: int

    def __call__(self, stream, seed):
        return mlp(gain=self.gain)

    def build(self, stream, seed):
        return mlp(gain=self.gain)


FACTORIES = {
    "a capture": capturing,
    "a default": by_default,
    "a default by keyword": by_name,
    "a partial of an installed function": lambda n: functools.partial(models.mlp, hidden=(4 + n,)),
    "a partial of one's own": lambda n: functools.partial(lambda stream, seed, gain: mlp(gain=gain), gain=n),
    "a cached function": cached,
    "a wrapped function": wrapped,
    "a function's attribute": remarked,
    "functions within": deep,
    "an object": Building,
    "a method": lambda n: Building(n).build,
}


class Boosted(ER):
    """A dataclass's child with an __init__ of its own."""

    def __init__(self, boost: Any) -> None:
        super().__init__(memory=9)
        self.boost = boost


def changed(n: int) -> Learner:
    learner = ER(memory=9)
    vars(learner)["later"] = n
    return learner


def with_class(n: int) -> Learner:
    return type("Other", (Learner,), {"rate": n})()


@dataclass
class Hidden(Learner):
    """A field that is not shown, and one that is not given."""

    a: int = field(default=0, repr=False, compare=False)
    b: int = field(default=0, init=False)


def hidden(n: int, name: str) -> Learner:
    learner = Hidden()
    setattr(learner, name, n)
    return learner


LEARNERS = {
    "a setting": lambda n: ER(memory=9 + n),
    "an __init__ of its own": Boosted,
    "an attribute of later": changed,
    "a class's attribute": with_class,
    "a field without a repr": lambda n: hidden(n, "a"),
    "a field that is not given": lambda n: hidden(n, "b"),
    "a lambda": lambda n: Boosted(lambda loss: loss * n),
    "a tensor": lambda n: Boosted(torch.tensor(float(n))),
    "a module": lambda n: Boosted(Own(n)),
    "a generator": lambda n: Boosted(drawing(n)),
}


class Quiet(NoConsolidation):
    """A consolidation that keeps more than its repr says."""

    def __init__(self, more: Any) -> None:
        object.__setattr__(self, "more", more)


CONSOLIDATIONS = {"an attribute": Quiet, "a lambda": lambda n: Quiet(lambda x: x + n)}
PAIRS = {"model": MODULES, "factory": FACTORIES, "learner": LEARNERS, "consolidation": CONSOLIDATIONS}
EACH = [(part, name) for part, pairs in PAIRS.items() for name in pairs]


def parts(part: str, thing: Any) -> tuple[Any, Any, Any]:
    """Model, learner and consolidation of a run that has `thing` for one of them."""
    chosen = {"model": mlp(), "learner": ER(memory=9), "consolidation": NoConsolidation()}
    chosen["model" if part == "factory" else part] = thing
    return chosen["model"], chosen["learner"], chosen["consolidation"]


def key(stream: data.Stream, model: Any, learner: Learner, consolidation: Any, place: Path) -> str:
    """The hash of a run in a sweep's store."""
    more: dict[str, Any] = {"device": "cpu", "progress": False, "jobs": 1, "store": place / "runs"}
    return str(sweep(stream, model, {"m": (learner, consolidation)}, training=SHORT, **more)["hash"][0])


@pytest.mark.parametrize(("part", "name"), EACH)
def test_what_differs_is_another_run_and_what_does_not_is_the_same(part, name, tmp_path):
    make, stream = PAIRS[part][name], toys.images() if "heads" in name else toys.stream(2)
    one, same, other = make(0), make(0), make(1)
    assert describe(one) == describe(same) == describe(copy.deepcopy(one)) != describe(other)
    keys = [key(stream, *parts(part, thing), tmp_path) for thing in (one, same, other)]
    assert keys[0] == keys[1] != keys[2]
    more: dict[str, Any] = {"training": SHORT, "device": "cpu", "progress": False, "checkpoint": tmp_path / "run"}
    first, again = (run(stream, *parts(part, thing), **more) for thing in (one, same))
    assert np.array_equal(first.accuracy, again.accuracy)
    with pytest.raises(ValueError, match=f"another run .*{'model' if part == 'factory' else part}.* there, .* here"):
        run(stream, *parts(part, other), **more)


def described() -> dict[str, str]:
    """The hashes of all cases."""
    return {f"{part} {name}": digest(describe(PAIRS[part][name](1))) for part, name in EACH}


def test_descriptions_are_the_same_in_another_process():
    code = "import json, test_store; print(json.dumps(test_store.described()))"
    command = [sys.executable, "-c", code]
    place = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": place}
    there = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert json.loads(there) == described()


def test_networks_and_settings_of_every_kind_are_described_and_their_copies_alike():
    fx = torch.fx.symbolic_trace(mlp())
    for thing in (models.convnet(toys.images()), models.gpt, SHORT, ER(9), fx, toys.stream(2)):
        assert describe(thing) == describe(thing)
        assert thing is fx or describe(thing) == describe(copy.deepcopy(thing))
    assert describe(torch.compile(mlp())) != describe(mlp())
    compiled = mlp()
    compiled.compile()
    assert describe(compiled) == describe(mlp())


def test_the_order_of_a_dict_does_not_count_and_sharing_does():
    assert describe({"a": [1], "b": [2]}) == describe({"b": [2], "a": [1]})
    assert describe({1: "a", (2, 3): "b"}) == describe({(2, 3): "b", 1: "a"}) != describe({"1": "a", (2, 3): "b"})
    one: list[Any] = [1]
    assert describe([one, one]) != describe([[1], [1]]) and describe((1, 1)) == describe((1, 1))
    one.append(one)
    assert describe(one) == [1, {"again": 0}]


def test_what_was_computed_from_the_rest_does_not_count():
    class Lazy:
        @functools.cached_property
        def double(self):
            return 2

    lazy, used = Lazy(), Lazy()
    assert used.double == 2 and describe(lazy) == describe(used)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (i for i in range(3)),
        threading.Lock,
        lambda: weakref.ref(Learner()),
        lambda: memoryview(b"ab"),
        lambda: torch.eye(2).to_sparse(),
    ],
    ids=["generator", "lock", "reference", "view", "sparse"],
)
def test_what_has_no_stable_description_is_refused_by_name(make, tmp_path):
    thing = make()
    kind = type(thing).__name__
    with pytest.raises(TypeError, match=f"(?s)learner.boost: {kind} .*no stable description.*`fingerprint`"):
        describe(Boosted(thing), "learner")
    with pytest.raises(TypeError, match=f"(?s)model.*thing: {kind} .*no stable description"):
        key(toys.stream(2), *parts("model", Own(thing)), tmp_path)
    with pytest.raises(TypeError, match=f"(?s)learner.boost: {kind} .*no stable description"):
        key(toys.stream(2), *parts("learner", Boosted(thing)), tmp_path)
    with pytest.raises(TypeError, match=f"(?s)consolidation.more: {kind} .*no stable description"):
        run(toys.stream(2), *parts("consolidation", Quiet(thing)), training=SHORT, checkpoint=tmp_path / "run")
    assert not list(tmp_path.iterdir())


class TestLocalModules:
    """A function of a file beside the notebook."""

    FILES = {
        "__init__": "from lab.nets import small, Net\n",
        "nets": "from . import sizes\nfrom lab.more import *\n\ndef small(stream, seed):\n    return sizes.width(), 1\n"
        "\nclass Net:\n    pass\n",
        "sizes": "import torch\nWIDTH = 4\n\ndef width():\n    return WIDTH\n",
        "more": "",
        "late": "DEPTH = 2\n",
        "other": "UNUSED = 1\n",
    }

    @pytest.fixture
    def lab(self, tmp_path, monkeypatch):
        (tmp_path / "lab").mkdir()
        for name, text in self.FILES.items():
            (tmp_path / "lab" / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        yield importlib.import_module("lab")
        for name in [name for name in sys.modules if name.split(".")[0] == "lab"]:
            del sys.modules[name]
        for name in [name for name in identity._LOADED if name.split(".")[0] == "lab"]:
            del identity._LOADED[name]

    def things(self, lab) -> dict[str, Any]:
        """What a notebook may pass: a function of the file, one of its own that reaches for it, in several ways."""
        cell: dict[str, Any] = {"__name__": "__main__", "lab": lab, "small": lab.small}
        text = """
            def direct(stream, seed): return small(stream, seed)
            def attribute(stream, seed): return lab.small(stream, seed)
            def within(stream, seed): return lab.nets.small(stream, seed)
            def late(stream, seed):
                from lab.nets import small
                return small(stream, seed)
            def captured(package): return lambda stream, seed: package.small(stream, seed)
        """
        exec("\n".join(line[12:] for line in text.splitlines()), cell)
        own = {name: cell[name] for name in ("direct", "attribute", "within", "late")}
        made = {"captured": cell["captured"](lab), "partial": functools.partial(lab.small, seed=1)}
        return {"function": lab.small, "class": lab.Net, "object": lab.Net(), "module": lab.nets} | own | made

    def edit(self, lab, name: str, text: str) -> None:
        """Changes a file, and imports everything again."""
        (Path(lab.__file__).parent / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        for inner in ("lab.more", "lab.sizes", "lab.nets", "lab"):
            importlib.reload(sys.modules[inner])

    @pytest.mark.parametrize(
        ("name", "text", "counts"),
        [
            ("nets", FILES["nets"].replace("(), 1", "(), 2"), True),
            ("sizes", FILES["sizes"].replace("return WIDTH", "return WIDTH + 1"), True),
            ("more", "import math\n", True),
            ("sizes", FILES["sizes"].replace("import torch", "# wide\nimport torch"), False),
            ("other", "UNUSED = 2\n", False),
        ],
        ids=["own file", "an imported file", "a file imported by star", "a comment", "a file that nobody imports"],
    )
    def test_its_file_counts_and_those_that_it_imports(self, lab, name, text, counts):
        before = {name: describe(thing) for name, thing in self.things(lab).items()}
        assert before == {name: describe(thing) for name, thing in self.things(lab).items()}
        self.edit(lab, name, text)
        after = {name: describe(thing) for name, thing in self.things(lab).items()}
        assert {name for name in before if before[name] != after[name]} == (set(before) if counts else set())

    def test_a_file_that_is_imported_only_when_a_function_runs_counts_too(self, lab):
        cell: dict[str, Any] = {"__name__": "__main__"}
        exec("def build(stream, seed):\n    from lab.late import DEPTH\n    return DEPTH", cell)
        before = describe(cell["build"])
        assert "lab.late" not in sys.modules and cell["build"](None, 0) == 2
        assert describe(cell["build"]) == before
        del sys.modules["lab.late"]
        (Path(lab.__file__).parent / "late.py").write_text("DEPTH = 3\n")
        assert describe(cell["build"]) != before

    def test_what_someone_sets_in_a_module_counts(self, lab, monkeypatch):
        before = {name: describe(thing) for name, thing in self.things(lab).items()}
        monkeypatch.setattr(lab.sizes, "WIDTH", 5)
        after = {name: describe(thing) for name, thing in self.things(lab).items()}
        assert {name for name in before if before[name] != after[name]} >= {"function", "direct", "attribute", "within"}

    def test_an_edit_without_a_new_import_is_refused(self, lab):
        before = describe(lab.small)
        (Path(lab.__file__).parent / "sizes.py").write_text("WIDTH = 5\n")
        with pytest.raises(TypeError, match=r"lab.sizes: .*sizes.py was edited after it was imported; restart"):
            describe(lab.small)
        (Path(lab.__file__).parent / "sizes.py").write_text(self.FILES["sizes"])
        assert describe(lab.small) == before


def test_differences_are_named():
    there = {"a": {"b": 1, "c": [1, 2]}, "d": float("nan"), "e": 1}
    assert store.differences(there, {"a": {"b": 1, "c": [1, 2]}, "d": float("nan"), "e": 1}) == []
    here = {"a": {"b": 2, "c": [1, 3]}, "d": float("nan"), "f": 1}
    found = ["a b: 1 there, 2 here", "a c 1: 2 there, 3 here", "e: 1 there, None here", "f: None there, 1 here"]
    assert store.differences(there, here) == found


def test_a_tensor_has_one_hash_wherever_and_however_it_lies():
    x = torch.randn(3, 4)
    assert store.hash_tensor(x) == store.hash_tensor(x.T.contiguous().T) == store.hash_tensor(x.clone())
    others = [x.double(), x.T, x.flatten(), x + 1, torch.empty(0, 3), torch.empty(3, 0), x.bfloat16(), x > 0]
    assert len({store.hash_tensor(t) for t in [x, *others]}) == len(others) + 1
    assert store.hash_tensor(torch.complex(x, x).conj()) == store.hash_tensor(torch.complex(x, -x))


class TestRecords:
    def test_what_was_made_is_remembered(self, tmp_path):
        calls, records = [], Records(tmp_path)

        def make():
            calls.append(1)
            return {"found": np.arange(3), "nothing": float("nan")}, [{"w": torch.ones(2)}]

        assert records.remember("a half of \ud83d\ude00"[:-1], lambda: ({}, None))["configuration"][-1] == "\ud83d"
        first, again = records.remember({"a": 1}, make), records.remember({"a": 1}, make)
        assert len(calls) == 1 and first["found"] == again["found"] == [0, 1, 2]
        assert first["configuration"] == {"a": 1} and torch.equal(
            records.tensors(digest({"a": 1}))[0]["w"], torch.ones(2)
        )
        records.remember({"a": 2}, make)
        assert len(calls) == 2 and not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.lock"))

    def test_tensors_are_made_when_they_are_asked_for(self, tmp_path):
        records = Records(tmp_path)
        records.remember(1, lambda: ({}, None))
        with pytest.raises(KeyError, match="no tensors"):
            records.tensors(digest(1))
        records.remember(1, lambda: ({}, [torch.ones(1)]), tensors=True)
        assert torch.equal(records.tensors(digest(1))[0], torch.ones(1))

    @pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "another's"])
    def test_damaged_tensors_are_set_aside_with_their_record(self, damage, tmp_path, caplog):
        records = Records(tmp_path)
        for n in (1, 2):
            records.remember(n, lambda n=n: ({}, [torch.full((9,), float(n))]))
        path, other = (tmp_path / f"{digest(n)}.safetensors" for n in (1, 2))
        whole = path.read_bytes()
        content = {"cut": whole[:-8], "flipped": whole[:-1] + b"\x01", "another's": other.read_bytes()}
        path.write_bytes(content[damage]) if damage in content else path.unlink()
        assert records.read(digest(1)) is not None
        assert records.read(digest(1), tensors=True) is None and "damaged" in caplog.text
        assert [p.name for p in tmp_path.glob("*.damaged")] == [f"{digest(1)}.damaged"]
        records.remember(1, lambda: ({}, [torch.full((9,), 1.0)]), tensors=True)
        assert path.read_bytes() == whole

    def test_one_of_many_makes_what_all_wait_for(self, tmp_path):
        made = []

        def make():
            made.append(1)
            return {"n": len(made)}, None

        found: list[Any] = []
        work = [threading.Thread(target=lambda: found.append(Records(tmp_path).remember("x", make))) for _ in range(8)]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        assert made == [1] and [record["n"] for record in found] == [1] * 8


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


class TestWhatCannotBeWritten:
    def test_a_store_says_so_before_anything_is_computed(self, tmp_path):
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file" / "deep"):
            with pytest.raises(ValueError, match=r"path: .*file.* cannot be written .*; give a file in a folder"):
                Records(folder).remember(1, lambda: pytest.fail("computed"))

    @pytest.mark.parametrize("tree", [None, [torch.ones(2)]])
    def test_what_was_computed_is_given_and_nothing_left_where_the_disk_is_full(
        self, tree, tmp_path, monkeypatch, caplog
    ):
        records, made = Records(tmp_path), []
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full)
            for _ in range(2):
                record = records.remember({"a": 1}, lambda: (made.append(1) or {"found": np.arange(3)}, tree))
                assert record == {"configuration": {"a": 1}, "found": [0, 1, 2], "tensors": False}
        assert len(made) == 2 and f"{digest({'a': 1})}" in caplog.text and "is used and not kept" in caplog.text
        assert not list(tmp_path.iterdir())
        assert records.remember({"a": 1}, lambda: ({}, tree))["tensors"] == (tree is not None)

    def test_a_sweep_gives_its_table_where_the_disk_is_full(self, tmp_path, monkeypatch):
        more: dict[str, Any] = {"training": SHORT, "device": "cpu", "progress": False, "jobs": 1, "store": tmp_path}
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full)
            table = sweep(toys.stream(2), mlp(), {"m": ER(9)}, **more)
        again = sweep(toys.stream(2), mlp(), {"m": ER(9)}, **more)
        assert len(table) and table.equals(again)

    def test_what_is_stored_is_read_where_nothing_can_be_written(self, tmp_path, monkeypatch):
        records = Records(tmp_path)
        records.remember(1, lambda: ({"found": 2}, None))
        monkeypatch.setattr("clkit.store.files.writable", full)
        assert records.remember(1, lambda: pytest.fail("computed"))["found"] == 2

    @pytest.mark.parametrize("failing", ["replace", "mkdir"])
    def test_a_file_that_cannot_be_written_is_named_and_leaves_no_half(self, failing, tmp_path, monkeypatch):
        store.write_tree(tmp_path / "w", [torch.zeros(2)])
        with monkeypatch.context() as patch:
            patch.setattr(Path, failing, full)
            with pytest.raises(OSError, match=r"w cannot be written .*No space left.*; free its disk or give another"):
                store.write_tree(tmp_path / "w", [torch.ones(2)])
        assert [p.name for p in tmp_path.iterdir()] == ["w"] and torch.equal(
            store.read_tree(tmp_path / "w")[0], torch.zeros(2)
        )


@pytest.mark.parametrize("home", ["~", "$HOME", "${HOME}/deep/.."])
def test_paths_are_expanded_wherever_they_are_taken(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "deep").mkdir()
    store.save_tensors(f"{home}/new/w.safetensors", {"w": torch.ones(1)}, {})
    assert store.load_tensors(f"{home}/new/w.safetensors")[0]["w"] == 1
    assert Records(f"{home}/runs").folder.resolve() == tmp_path / "runs"
    for name in "ab":
        (tmp_path / "pack" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (2, 2), i).save(tmp_path / "pack" / name / f"{i}.png")
    (tmp_path / "own.txt").write_text("one\n\ntwo\n")
    assert data.folder(f"{home}/pack").name == "pack"
    assert data.text_file(f"{home}/own.txt", f"{home}/own.txt").name == "own"
    monkeypatch.setenv("CLKIT_DATA", home)
    assert data.load("pack").classes == ("a", "b")
    monkeypatch.setenv("CLKIT_CACHE", f"{home}/cache")
    assert store.cache_root().resolve() == tmp_path / "cache"
    for read in (
        lambda: data.folders(f"{home}/none"),
        lambda: data.texts("math", path=f"{home}/none"),
        lambda: data.load("mnist", f"{home}/none", download=False),
        lambda: modulation.network(f"{home}/none", mlp()),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=f"{tmp_path}/"):
            read()
    assert modulation.listed(f"{home}/new") == []


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CLKIT_CACHE", "~/elsewhere")
    assert store.cache_root() == Path.home() / "elsewhere"
    monkeypatch.delenv("CLKIT_CACHE")
    assert store.cache_root() == Path.home() / ".cache" / "clkit"


def test_json_is_written_legibly_and_whole(tmp_path):
    store.write_json(tmp_path / "deep" / "x.json", {"a": [1], "ü": None})
    assert (tmp_path / "deep" / "x.json").read_text(encoding="utf-8") == '{\n "a": [\n  1\n ],\n "ü": null\n}\n'
    with pytest.raises(TypeError):
        store.write_json(tmp_path / "deep" / "x.json", {"a": object()})
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.json"]

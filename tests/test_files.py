"""Files: whole or refused, whatever became of them on the disk, whatever they hold, and wherever a path leads."""

import copy
import functools
import json
import os
import pickle
import random
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import toys
from clkit import checkpoint, models, modulation, store
from clkit.experiments import stored_weights
from clkit.learners import ER
from clkit.store import Records, digest
from clkit.store.files import CHECKED, Unreadable, _sign
from clkit.training import Result, Training

CONFIGURATION = {"lr": 1e-05, "name": "\x1b"}  # what JSON can spell in two ways
KEY = digest(CONFIGURATION)
REFUSED = (ValueError, TypeError, FileNotFoundError)


@functools.cache
def network() -> Any:
    return models.mlp(toys.stream(2), hidden=(4,), seed=0)


@functools.cache
def modulated() -> modulation.Modulated:
    return modulation.Modulated(network())


def ran(**more: Any) -> Result:
    """A short run, or what is left of one to do."""
    training = Training(epochs=1, batch=16)
    return toys.quick(toys.stream(2), ER(memory=9), model=models.mlp, training=training, watch=0, **more)


@functools.cache
def result() -> Result:
    return ran()


def write_task(path: Path) -> None:
    modulation.save(path, modulated(), modulated().state((0, 1)), name="x", class_names=["a", "b"])


def write_record(path: Path) -> None:
    made = {"rows": [{"acc": 0.5}], "seconds": 1.0}, [{"w": torch.ones(3)}]
    Records(path.parent).remember(CONFIGURATION, lambda: made, tensors=True)


def read_record(path: Path) -> dict[str, Any]:
    """The record beside a path, tensors too."""
    if (found := Records(path.parent).read(KEY, tensors=True)) is None:
        raise ValueError(f"{path} is set aside; make it again")
    return found


def read_cache(path: Path) -> Any:
    if (found := store.intact(path, store.read_tree)) is None:
        raise ValueError(f"{path} is set aside; make it again")
    return found


def read_kept(path: Path) -> Any:
    try:
        return stored_weights(KEY, path.parent)
    except KeyError as error:
        raise ValueError(f"{path}: {error}") from error


def read_listed(path: Path) -> Any:
    if not (found := modulation.listed(path.parent)):
        raise ValueError(f"{path} is left out; give another")
    return found


IMAGES = {"x": torch.arange(75, dtype=torch.uint8).reshape(1, 3, 5, 5), "y": torch.arange(1)}
WRITERS: dict[str, tuple[str, Callable[[Path], Any], Callable[[Path], Any]]] = {
    "tensors": ("w", lambda path: store.save_tensors(path, {"a": torch.arange(4.0)}, {"of": 1}), store.load_tensors),
    "tree": ("t", lambda path: store.write_tree(path, [torch.ones(2, 3).T, {"a": np.ones(2)}, None]), store.read_tree),
    "task": ("m.safetensors", write_task, lambda path: modulation.load(path, modulated())),
    "cache": ("c.safetensors", lambda path: store.write_tree(path, IMAGES), read_cache),
    "record": (f"{KEY}.json", write_record, read_record),
    "kept weights": (f"{KEY}.safetensors", write_record, read_record),
    "result": ("r", lambda path: result().save(path), Result.load),
}  # by what is written: the file's name, and what writes and reads one at a path
READERS: dict[str, Callable[[Any], Any]] = {
    "content": store.content,
    "json": store.read_json,
    "tensors": store.load_tensors,
    "tree": store.read_tree,
    "checkpoint": checkpoint.read,
    "result": lambda path: (lambda found: (repr(found), found.summary(), found.trajectory()))(Result.load(path)),
    "resume": lambda path: ran(resume=path),
    "task": lambda path: modulation.load(path, modulated()),
    "network": lambda path: modulation.network(path, network()),
}  # of files from outside: an error is one of `REFUSED` and names the path
BESIDE = {"listed": read_listed, "kept": read_kept, "record": read_record}  # by their folder


def whole(name: str, folder: Path) -> Path:
    """A file as a writer leaves it."""
    file, write, _ = WRITERS[name]
    write(folder / file)
    return folder / file


def damaged(content: bytes, bits: Iterator[int]) -> Iterator[bytes]:
    for bit in bits:
        found = bytearray(content)
        found[bit // 8] ^= 1 << bit % 8
        yield bytes(found)


def check_refused(name: str, path: Path, contents: Iterator[bytes]) -> None:
    """Every one of these contents of a writer's file is refused, and nothing of it is lost."""
    kept = {file: file.read_bytes() for file in path.parent.iterdir()}
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(REFUSED, match="; "):
            print(WRITERS[name][2](path), content)
        for file in path.parent.iterdir():
            file.unlink()
        for file, before in kept.items():
            file.write_bytes(before)
    WRITERS[name][2](path)


@pytest.mark.parametrize("name", WRITERS)
def test_a_flipped_bit_is_refused(name, tmp_path, caplog):
    caplog.set_level("ERROR")
    path, draw = whole(name, tmp_path), random.Random(0)
    content = path.read_bytes()
    places = range(len(content)) if len(content) < 300 else draw.sample(range(len(content)), 60)
    bits = (8 * place + bit for place in places for bit in {5, draw.randrange(8)})  # 5: e for E, alike to JSON
    check_refused(name, path, damaged(content, bits))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_every_flipped_bit_is_refused(name, tmp_path, caplog):
    caplog.set_level("ERROR")
    path = whole(name, tmp_path)
    content = path.read_bytes()
    bits = range(8 * len(content)) if len(content) < 1000 else random.Random(1).sample(range(8 * len(content)), 4000)
    check_refused(name, path, damaged(content, iter(bits)))


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_was_cut_or_grew_is_refused(name, tmp_path, caplog):
    caplog.set_level("ERROR")
    path = whole(name, tmp_path)
    content = path.read_bytes()
    check_refused(name, path, iter([content[:n] for n in range(0, len(content), len(content) // 20)]))
    check_refused(name, path, iter([content + b"\0", content + content, b"\0" * len(content)]))


def test_tensors_from_elsewhere_have_no_header(tmp_path):
    for metadata in (None, {"format": "pt"}, {"checksum": "1"}):
        save_file({"a": torch.ones(2), "clkit": torch.ones(1)}, tmp_path / "w", metadata=metadata)
        tensors, header = store.load_tensors(tmp_path / "w")
        assert torch.equal(tensors["a"], torch.ones(2)) and header == {}


DEEP = "[" * 100_000
HEADERS = [
    "",
    "null",
    "[1]",
    "3",
    "1" * 5000,
    '"x"',
    "{",
    DEEP,
    '{"tree": "{"}',
    '{"tree": 3}',
    f'{{"tree": "{DEEP}"}}',
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_nobody_signed_is_refused(header, tmp_path):
    for text in (header, "written by clkit, checksum " + "0" * 16 + header):
        save_file({"0/a": torch.ones(2)}, tmp_path / "w", metadata={"clkit": text})
        for name in ("tensors", "tree", "result", "task"):
            with pytest.raises(ValueError, match=rf"path: {tmp_path}/w is damaged.*; "):
                READERS[name](tmp_path / "w")


NODE = "tensor of this file"
STRIDES = ([0, 0], [1, 1], [2**62] * 2, [-1, 1], [9, 1], [1], "x", [1.5, 1], {})
TREES = [
    *({NODE: "0/a", "stride": stride} for stride in STRIDES),
    *({NODE: name} for name in ("b", None, 3, [], {})),
    {NODE: "half", "array": True},
]  # fmt: skip


@pytest.mark.parametrize("tree", [*map(json.dumps, TREES), DEEP, "{", 3, None, "1" * 5000], ids=repr)
def test_a_tree_that_no_writer_made_is_refused(tree, tmp_path):
    tensors = {"0/a": torch.ones(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}
    store.save_tensors(tmp_path / "w", tensors, {"tree": tree})
    for name in ("tree", "result"):
        with pytest.raises(ValueError, match=rf"path: {tmp_path}/w .*; give"):
            READERS[name](tmp_path / "w")


def test_a_tree_that_holds_itself_is_refused(tmp_path):
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(TypeError, match="tree: it holds itself"):
        store.write_tree(tmp_path / "w", tree)
    assert not list(tmp_path.iterdir())


ODD = (None, True, -1, 10**30, float("nan"), "", "text", [], {}, [[]], {"a": 1}, [1, 2], np.zeros(3), torch.ones(2, 3))


def places(tree: Any, place: tuple = ()) -> Iterator[tuple]:
    """Where in a tree there is something."""
    for name, part in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*place, name)
        yield from places(part, (*place, name))


def mutated(tree: Any, draw: random.Random, odd: Any = ODD) -> Any:
    """A tree in which one thing is missing, or another."""
    tree = node = copy.deepcopy(tree)
    depth = draw.choice((1, 2, 2, 3, 9))
    *way, last = draw.choice([place for place in places(tree) if len(place) <= depth])
    for name in way:
        node = node[name]
    if draw.random() < 0.3:
        del node[last]
    else:
        node[last] = copy.deepcopy(draw.choice(odd))
    return tree


@pytest.mark.parametrize("seed", range(8))
def test_what_else_a_file_holds_is_refused_or_right(seed, tmp_path):
    """A file that is whole, but of something that is no result, no task or no record."""
    draw, path = random.Random(seed), tmp_path / "x.safetensors"
    tensors, header = store.load_tensors(whole("task", tmp_path))
    store.write_tree(path, {name: part for name, part in vars(result()).items() if name not in checkpoint.LIVE})
    tree = store.read_tree(path)
    (tmp_path / "m.safetensors").unlink()
    for i in range(10):
        if i % 2:
            store.write_tree(path, mutated(tree, draw))
        else:
            few = {name: t for name, t in tensors.items() if draw.random() < 0.9}
            few |= {draw.choice([*tensors]): draw.choice([torch.ones(()), torch.ones(2), torch.ones(8, 4).half()])}
            store.save_tensors(path, few, mutated(header, draw, ODD[:-2]))
        for name, read in (READERS | {"listed": read_listed}).items():
            try:
                read(path)
            except REFUSED as error:
                assert str(path) in str(error) and "; " in str(error), name


@pytest.mark.parametrize("seed", range(4))
def test_a_record_that_holds_something_else_is_set_aside(seed, tmp_path, caplog):
    caplog.set_level("ERROR")
    draw, path = random.Random(seed), whole("record", tmp_path)
    content, weights = json.loads(path.read_bytes()), whole("kept weights", tmp_path).read_bytes()
    for _ in range(20):
        found = mutated(content, draw, ODD[:-2])
        path.write_text(json.dumps({"checksum": "0" * 16} | found, indent=1))
        if draw.random() < 0.8 and found.get("checksum") == content["checksum"]:
            path.write_text(path.read_text().replace(content["checksum"], "0" * 16))
            _sign(path, CHECKED)
        path.with_suffix(".safetensors").write_bytes(weights)
        for read in (read_record, read_kept):
            try:
                read(path)
            except ValueError:
                assert not path.exists() or not found["record"]["tensors"]
    start = CHECKED.decode() + "0" * 16
    signed = [f'{start}", "record": {part}}}' for part in (DEEP, "1", "[]", "{}")]
    for text in ("null", "[]", DEEP, "1" * 5000, *signed):
        path.write_text(text)
        if text in signed:
            _sign(path, CHECKED)
        assert Records(tmp_path).read(KEY) is None and not path.exists()
    for tree in ([], 3, torch.ones(2), {"key": 1}, {"key": KEY}):
        write_record(path)
        store.write_tree(path.with_suffix(".safetensors"), tree)
        with pytest.raises(ValueError, match="holds no tensors"):
            read_kept(path)


def test_loaded_tensors_are_their_own(tmp_path):
    """What becomes of the file is no matter: it was mapped, changed with the file and died with it."""
    path = tmp_path / "w"
    store.save_tensors(path, {"a": torch.arange(100_000)}, {})
    tensors, _ = store.load_tensors(path)
    with path.open("r+b") as file:
        file.seek(200)
        file.write(b"\xff" * 1000)
        file.truncate(2000)
    assert torch.equal(tensors["a"], torch.arange(100_000))
    tensors["a"] += 1
    assert path.stat().st_size == 2000


def odd_path(kind: str, folder: Path) -> Any:
    """A path that no reader can read, by kind."""
    path = folder / "odd.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as end:
            end.bind(f"{short}/s")  # such a name has at most 107 letters
            Path(short, "s").rename(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to(folder / "nothing")
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "below a file":
        path.touch()
        path /= "x"
    more = {"long": folder / ("a" * 300), "null": f"{folder}/a\0b", "surrogate": f"{folder}/\ud800"}
    return (more | {"empty": "", "nobody": "~nobody/x", "number": 3, "none": None}).get(kind, path)


IN_FOLDER = ("folder", "pipe", "socket", "device", "dangling", "circle", "missing")
ODD_PATHS = (*IN_FOLDER, "below a file", "long", "null", "surrogate", "empty", "nobody", "number", "none")


@pytest.mark.parametrize("kind", ODD_PATHS)
@pytest.mark.parametrize("name", READERS)
def test_a_path_that_leads_to_no_file_is_refused(name, kind, tmp_path):
    path = odd_path(kind, tmp_path)
    if name == "resume" and kind == "none":
        pytest.skip("no argument")
    with pytest.raises(REFUSED, match="; ") as found:
        READERS[name](path)
    assert isinstance(found.value, FileNotFoundError) == (kind in {"dangling", "missing", "below a file", "nobody"})


@pytest.mark.parametrize("kind", IN_FOLDER)
def test_what_is_no_file_is_left_out_and_set_aside(kind, tmp_path, caplog):
    write_task(tmp_path / "good.safetensors")
    odd_path(kind, tmp_path)
    assert [entry["file"] for entry in modulation.listed(tmp_path)] == ["good.safetensors"]
    for suffix in (".safetensors", ".json"):
        path, made = whole("record", tmp_path / suffix).with_suffix(suffix), tmp_path / suffix / "made"
        path.unlink()
        made.mkdir()
        if kind != "missing":
            odd_path(kind, made).rename(path)
        assert Records(tmp_path / suffix).read(KEY, tensors=True) is None
        write_record(path)  # where nothing but a file is written over, it is computed all the same


def test_a_file_is_read_over_links_up_to_a_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert store.content(tmp_path / "link", most=5) == b"12345"
    with store.regular(tmp_path / "link") as file:
        assert file.read(2) == b"12" and file.seek(4) == 4
    message = r"^archive: .*link cannot be read \(it has 5 bytes, the limit is 4\); give a zip$"
    with pytest.raises(ValueError, match=message):
        store.regular(tmp_path / "link", "archive", "give a zip", most=4)


def test_what_cannot_be_read_now_counts_as_missing_and_stays(tmp_path, monkeypatch, caplog):
    path = whole("record", tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        for _ in range(2):
            assert Records(tmp_path).read(KEY) is None
        with pytest.raises(Unreadable, match=f"path: {path} cannot be read .Too many open files.; "):
            store.content(path)
    assert caplog.text.count("Too many open files") == 1
    assert Records(tmp_path).read(KEY) is not None


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
@pytest.mark.parametrize("name", ["tensors", "tree", "task", "result"])
def test_nothing_but_a_file_is_written_over(name, kind, tmp_path):
    path = odd_path(kind, tmp_path)
    before = path.lstat()
    with pytest.raises(
        (OSError, ValueError), match=f"{path} cannot be written .*a folder, a pipe or a device has that"
    ):
        WRITERS[name][1](path)
    assert os.path.samestat(before, path.lstat()) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", WRITERS)
def test_what_killed_writers_left_is_swept_and_nothing_else(name, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    file, write, _ = WRITERS[name]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(Killed))
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        for _ in range(2):
            with pytest.raises(Killed):
                write(tmp_path / file)
    left = sorted(tmp_path.glob(".*"))
    old, fresh = left[0], left[-1]
    others = [tmp_path / ".other", tmp_path / f".{file}", tmp_path / f".{file}.swp", tmp_path / f"{file}.old"]
    for path in others:
        path.touch()
    for path in [*others, old]:
        os.utime(path, (0, 0))
    write(tmp_path / file)
    assert not old.exists() and all(path.exists() for path in others[:1])
    assert name in ("record", "kept weights") or (fresh.exists() and all(path.exists() for path in others))
    WRITERS[name][2](tmp_path / file)


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def vanish(folder: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder)
    folder.touch()


FAULTS = {
    "a full disk": lambda folder, patch: patch.setattr(Path, "replace", full),
    "no lock": lambda folder, patch: patch.setattr("clkit.store.files.FileLock", full),
    "no new files": lambda folder, patch: patch.setattr(tempfile, "mkstemp", full),
    "nothing to be read": lambda folder, patch: patch.setattr(os, "open", full),
    "a file in its place": vanish,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_in_the_midst_says_so_once_and_all_is_computed(fault, tmp_path, monkeypatch, caplog):
    (tmp_path / "runs").mkdir()
    records, made = Records(tmp_path / "runs"), []
    records.check()
    with monkeypatch.context() as patch:
        FAULTS[fault](records.folder, patch)
        for i in range(6):  # a worker's is a copy
            there = records if i % 2 else pickle.loads(pickle.dumps(records))
            found = there.remember({"n": i}, lambda i=i: (made.append(i) or {"found": i}, [torch.ones(1)]))
            assert found["found"] == i and found["configuration"] == {"n": i}
    assert made == [*range(6)]
    told = [record.message for record in caplog.records]
    assert len(told) == len({message.split("; ")[-1] for message in told}) >= 1
    assert all(str(records.folder) in message for message in told)


def test_a_store_that_cannot_be_written_says_so_before_the_work(tmp_path, monkeypatch):
    Records(tmp_path / "new").check()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"path: .*file/record.json cannot be written"):
        Records(tmp_path / "file").check()
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("w+b"))
    with pytest.raises(ValueError, match=r"path: .*No space left"):
        Records(tmp_path / "new").check()


class TestLocks:
    def test_one_who_fails_leaves_the_lock_to_those_who_wait(self, tmp_path):
        """Who waits for a lock that is deleted, and who comes anew, would both compute."""
        records = Records(tmp_path)
        inside, made, found = [], [], []

        def make() -> Any:
            inside.append(1)
            assert len(inside) == 1, "two at a time"
            made.append(1)
            if len(made) == 1:
                for thread in waiting:
                    thread.start()
            inside.pop()
            if len(made) < 3:
                raise RuntimeError("out of luck")
            return {"n": len(made)}, None

        def ask() -> None:
            try:
                found.append(records.remember("x", make)["n"])
            except RuntimeError:
                assert (tmp_path / f"{digest('x')}.lock").exists()

        waiting = [threading.Thread(target=ask) for _ in range(4)]
        ask()
        newcomers = [threading.Thread(target=ask) for _ in range(4)]
        for thread in newcomers:
            thread.start()
        for thread in [*waiting, *newcomers]:
            thread.join()
        assert made == [1] * 3 and found == [3] * 7
        assert [path.name for path in tmp_path.iterdir()] == [f"{digest('x')}.json"]

    def test_an_interrupt_leaves_it_too(self, tmp_path):
        records = Records(tmp_path)
        with pytest.raises(KeyboardInterrupt), records.lock("key"):
            raise KeyboardInterrupt
        assert (tmp_path / "key.lock").exists()
        with records.lock("key"):
            pass
        assert not list(tmp_path.iterdir())

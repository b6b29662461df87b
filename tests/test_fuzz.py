"""Foreign input of every kind, damaged at random, and odd arguments: right, or refused in words of clkit's own.

A row of `READERS` makes a good input in a folder and reads it; `DAMAGES` are what may have happened to its files.
Nothing that is read is run, nothing outside its folder is written, and nothing is waited for. Where a checksum guards
the input, a flipped bit is refused or changes nothing. `CLKIT_DRAWS=1000 pytest -m slow -s tests/test_fuzz.py` draws
so many of each row and prints what became of them.
"""

import bz2
import functools
import inspect
import io
import json
import linecache
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import sys
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import clkit
import test_clip
import toys
from clkit import (
    alignment,
    checkpoint,
    cli,
    consolidation,
    curvature,
    data,
    experiments,
    landscape,
    memory,
    merging,
    metrics,
    models,
    modulation,
    normalization,
    store,
    weights,
)  # fmt: skip
from clkit.learners import LEARNERS, Learner
from clkit.modulation import Modulated, Modulation
from clkit.training import Result, Training, evaluate, run
from clkit.weights import get_weights

DRAWS = int(os.environ.get("CLKIT_DRAWS", "12"))
HOME = str(Path(clkit.__file__).parent)
OURS = (ValueError, TypeError, FileNotFoundError, ImportError, FloatingPointError)
ENDLESS = 60  # seconds after which a reader counts as waiting for ever
MEMORY = 2**31  # bytes that a reader of a few kilobytes may take
QUICK = settings(
    max_examples=DRAWS,
    derandomize="CLKIT_DRAWS" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=[*HealthCheck],
    phases=[Phase.generate],
)
pytestmark = pytest.mark.filterwarnings("ignore")  # what is damaged may warn


def is_ours(error: BaseException) -> bool:
    """Whether a `raise` of clkit's own ends in this error, which begins with a name and goes on with a remedy."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised = linecache.getline(last.filename, last.lineno or 0).strip().startswith("raise ")
    named = re.match(r"[^\n:]+: .*[;,] \w", str(error), re.DOTALL)
    filled = any(isinstance(cause, MemoryError) for cause in (error.__context__, error.__cause__))
    return isinstance(error, OURS) and last.filename.startswith(HOME) and raised and bool(named) and not filled


class Canary:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


CANARY = "canary"  # the file that what is run would leave beside the folder that is read
CODE = "import pathlib\npathlib.Path({canary!r}).touch()\nclass Own: ...\n"


# --- good inputs ---


def images(folder: Path, *, kind: str = "png") -> None:
    for part in ("train", "test"):
        for label in "ab":
            (folder / part / label).mkdir(parents=True)
            for i in range(2):
                drawn = np.random.default_rng(i + ord(label)).integers(0, 255, (5, 6, 3), np.uint8)
                Image.fromarray(drawn).save(folder / part / label / f"{i}.{kind}")


def packed(make: Callable[[Path], None], name: str = "pack.zip") -> Callable[[Path], None]:
    """The same input as a zip, half of its entries compressed."""

    def zipped(folder: Path) -> None:
        make(folder / "tree")
        with zipfile.ZipFile(folder / name, "w") as archive:
            for i, place in enumerate(sorted((folder / "tree").rglob("*"))):
                kind = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
                archive.write(place, place.relative_to(folder / "tree"), kind)
        shutil.rmtree(folder / "tree")

    return zipped


SUMS = [{"question": f"{i}+{i}?", "answer": f"<<{i}+{i}={2 * i}>>It is {2 * i}.\n#### {2 * i}"} for i in range(3)]


def sums(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for part in ("train", "test"):
        (folder / f"gsm8k_{part}.jsonl").write_text("\n".join(map(json.dumps, SUMS)))


def mnist(folder: Path) -> None:
    """torchvision's own files of numbers: a magic number, sizes, bytes."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 12), ("t10k", 4)):
        head = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + bytes(range(196)) * 4 * count)
        labels = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels + bytes(i % 10 for i in range(count)))


def usps(folder: Path) -> None:
    for name in ("usps.bz2", "usps.t.bz2"):
        rows = [f"{1 + i % 10} " + " ".join(f"{p + 1}:{(p % 3) - 1}" for p in range(256)) for i in range(6)]
        (folder / name).write_bytes(bz2.compress("\n".join(rows).encode()))


def eurosat(folder: Path) -> None:
    for label in "ab":
        place = folder / "eurosat" / "2750" / label
        place.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (6, 6), (i, 9, ord(label))).save(place / f"{i}.png")


def food(folder: Path) -> None:
    base = folder / "food-101"
    (base / "meta").mkdir(parents=True)
    for part in ("train", "test"):
        (base / "meta" / f"{part}.json").write_text(json.dumps({c: [f"{c}/0", f"{c}/1"] for c in ("apple", "pie")}))
    for label in ("apple", "pie"):
        (base / "images" / label).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (6, 6), (i, 9, 9)).save(base / "images" / label / f"{i}.jpg")


@functools.cache
def language() -> data.Stream:
    return data.domains({"a": data.texts("math", context=8, limit=2, test_limit=2)})


def language_model(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=4, n_layer=1, n_head=1, n_positions=8, vocab_size=256)
    with torch.random.fork_rng([]):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def tokenizer(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds

    made = Tokenizer(kinds.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


@functools.cache
def pictures() -> data.Stream:
    return test_clip.pictures()


@functools.cache
def open_clip() -> Any:
    return test_clip.fake(lambda: Path("none"))


def clip_weights(folder: Path) -> None:
    state = open_clip().create_model("tiny").state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "w.safetensors")


def read_clip(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "open_clip", open_clip())
        return models.clip(pictures(), "tiny", folder / "w.safetensors")


@functools.cache
def coloured() -> data.Stream:
    return toys_images(3, 32)


def toys_images(channels: int, side: int) -> data.Stream:
    parts = [data.Examples(torch.zeros(4, channels, side, side, dtype=torch.uint8), [0, 1, 0, 1]) for _ in range(2)]
    return data.split(data.Dataset("d", *parts, ("a", "b")), 1)


def zoo_weights(folder: Path) -> None:
    net = models.torchvision(coloured(), "squeezenet1_1")
    save_file({name: tensor.half() for name, tensor in net.state_dict().items()}, folder / "w.safetensors")


def notebook(folder: Path) -> None:
    code = {"cell_type": "code", "metadata": {"tags": []}, "source": "1 + 1", "execution_count": 1, "id": "a"}
    output = {"output_type": "execute_result", "data": {"text/plain": "2"}, "metadata": {}, "execution_count": 1}
    text = {"cell_type": "markdown", "metadata": {}, "source": ["# Title"], "id": "b"}
    book = {"cells": [text, {**code, "outputs": [output]}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "a.ipynb").write_text(json.dumps(book, indent=1))


def read_notebook(folder: Path) -> Any:
    """All but the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clkit.experiments.notebooks._execute", lambda path, book, *_: len(book.cells))
        return experiments.execute(experiments.find([str(folder / "a.ipynb")]), progress=False)


def command(*argv: str) -> Any:
    """A command whose error is one line of ours and a status."""
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()):
        status = cli.main(argv)
    if status:
        assert status == 2 and err.getvalue().startswith("clkit: ") and err.getvalue().count("\n") == 1
        assert re.match(r"clkit: [^:]+: .*[;,] \w", err.getvalue()), err.getvalue()
    return status


RUN = ("run", "--quiet", "--device", "cpu", "--epochs", "0", "--model", "mlp", "--hidden", "2", "--tasks", "1")


def lines(folder: Path) -> None:
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"q": f"say {i}", "n": i}) for i in range(5)))


WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False]), "c": torch.zeros(0, 2)}
TREE = {"list": [1, None, 2.5, "x"], "tensors": [WEIGHTS["a"], WEIGHTS["a"].T], "array": np.arange(3)}


@functools.cache
def learned() -> Result:
    return toys.quick(toys.stream(2))


@functools.cache
def modulated() -> Modulated:
    return Modulated(backbone(), Modulation(2, 2), layers="all")


@functools.cache
def backbone() -> torch.nn.Module:
    return models.convnet(toys_images(3, 8), (4, 6))


def task(folder: Path) -> None:
    modulation.save(folder / "a.safetensors", modulated(), modulated().state([0, 1]), name="a", class_names=["x", "y"])


def records(folder: Path) -> None:
    for number in (1, 2):
        store.Records(folder).remember({"n": number}, lambda number=number: ({"found": [number]}, TREE))


def read_records(folder: Path) -> Any:
    """Those that are damaged are set aside and made again."""
    made = store.Records(folder)
    keys = [store.digest({"n": number}) for number in (1, 2)]
    found = [made.read(key, tensors=True) for key in keys]
    return [(record, made.tensors(key)) if record else None for key, record in zip(keys, found, strict=True)]


def page(folder: Path) -> experiments.Page:
    (folder / "figures").mkdir(exist_ok=True)
    return experiments.Page("p", "fast", folder, {"n": 3})


def results(folder: Path) -> None:
    page(folder).results(lambda: pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}), {"n": 1}, commit=True)
    (folder / "figures" / "p-claims.json").write_text(json.dumps({"parameters": {"n": 3}, "claims": [], "laws": []}))


def read_results(folder: Path) -> Any:
    return repr(page(folder).results(lambda: pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}), {"n": 1}, commit=True))


def read_pack(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLKIT_DATA", str(folder))
        return data.load("pack")


def read_tokenizer(folder: Path) -> Any:
    data.text._tokenizer.cache_clear()
    (folder / "own.txt").write_text("some words\n\nothers")
    return data.text_file(folder / "own.txt", tokenizer=folder, context=8)


def read_figures(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        done = experiments.notebooks.Outcome("a", 0, 0, 0, 0, 0, "")
        patch.setattr("clkit.experiments.notebooks._execute", lambda *_: done)
        return command("figures", "--quiet", str(folder / "a.ipynb"))


class Reader(NamedTuple):
    """What makes a good input in an empty folder, and what reads it; `sealed` if a checksum guards what it holds."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    sealed: bool = False


READERS = {
    "text_file, text": Reader(
        lambda folder: [*map((folder / "a.txt").write_text, ["one\n\ntwo\n\nthree\n"])] and None,
        lambda folder: data.text_file(folder / "a.txt", context=4),
    ),
    "text_file, rows": Reader(lines, lambda folder: data.text_file(folder / "a.jsonl", fields=("q", "n"), context=4)),
    "texts, folder": Reader(sums, lambda folder: data.texts("math", path=folder, context=8)),
    "texts, zip": Reader(packed(sums), lambda folder: data.texts("math", path=folder / "pack.zip", context=8), True),
    "folder": Reader(images, data.folder),
    "folder, jpg": Reader(functools.partial(images, kind="jpg"), functools.partial(data.folder, size=4)),
    "folder, gif": Reader(functools.partial(images, kind="gif"), functools.partial(data.folder, size=4)),
    "folder, tif": Reader(functools.partial(images, kind="tif"), functools.partial(data.folder, size=4)),
    "folder, webp": Reader(functools.partial(images, kind="webp"), functools.partial(data.folder, size=4)),
    "folder, zip": Reader(packed(images), lambda folder: data.folder(folder / "pack.zip"), True),
    "load, pack": Reader(packed(images), read_pack),
    "load, mnist": Reader(mnist, lambda folder: data.load("mnist", folder, download=False)),
    "load, usps": Reader(usps, lambda folder: data.load("usps", folder, download=False)),
    "load, eurosat": Reader(eurosat, lambda folder: data.load("eurosat", folder, size=4, download=False)),
    "load, food101": Reader(food, lambda folder: data.load("food101", folder, size=4, download=False)),
    "huggingface": Reader(language_model, lambda folder: models.huggingface(language(), folder)),
    "tokenizer": Reader(tokenizer, read_tokenizer),
    "clip": Reader(clip_weights, read_clip),
    "torchvision": Reader(
        zoo_weights, lambda folder: models.torchvision(coloured(), "squeezenet1_1", folder / "w.safetensors")
    ),
    "notebook": Reader(notebook, read_notebook),
    "load_tensors": Reader(
        lambda folder: store.save_tensors(folder / "w.safetensors", WEIGHTS, {"kind": "w", "n": [1, 2]}),
        lambda folder: store.load_tensors(folder / "w.safetensors"),
        True,
    ),
    "read_tree": Reader(
        lambda folder: store.write_tree(folder / "t.safetensors", TREE),
        lambda folder: store.read_tree(folder / "t.safetensors"),
        True,
    ),
    "checkpoint": Reader(
        lambda folder: learned().save(folder / "run.safetensors"),
        lambda folder: checkpoint.read(folder / "run.safetensors"),
        True,
    ),
    "Result.load": Reader(
        lambda folder: learned().save(folder / "run.safetensors"),
        lambda folder: vars(Result.load(folder / "run.safetensors")),
        True,
    ),
    "resume": Reader(
        lambda folder: learned().save(folder / "run.safetensors"),
        lambda folder: repr(toys.quick(toys.stream(2), resume=folder / "run.safetensors").accuracy),
    ),
    "modulation.load": Reader(
        task, lambda folder: modulation.load(folder / "a.safetensors", modulated()).tensors, True
    ),
    "modulation.listed": Reader(task, modulation.listed),
    "modulation.network": Reader(task, lambda folder: modulation.network(folder / "a.safetensors", backbone()), True),
    "records": Reader(records, read_records),
    "page results": Reader(results, read_results),
    "clkit run": Reader(images, lambda folder: command(*RUN, "--data", str(folder))),
    "clkit figures": Reader(notebook, read_figures),
}


# --- what may have happened to it ---

Draw = random.Random
ODD: list[Any] = [
    None, True, -1, 0, 1e400, float("nan"), 10**30, -(10**20), "", "x", "../../evil", "own.Own", "\0", "é" * 300, [],
    {}, [[]], [None], {"a": 1}, {"": None}, "\ud800", 2.5, "9" * 5000, "__class__",
    {"auto_map": {"AutoModelForCausalLM": "own.Own"}},
]  # fmt: skip


def flip(draw: Draw, file: Path) -> None:
    content = bytearray(file.read_bytes() or b"\0")
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(draw: Draw, file: Path) -> None:
    content = file.read_bytes()
    a, b = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    file.write_bytes(content[:a] if draw.random() < 0.5 else content[:a] + content[b:])


def insert(draw: Draw, file: Path) -> None:
    content = file.read_bytes()
    a = draw.randrange(len(content) + 1)
    odd = [
        b"\0",
        b"\xff\xfe",
        b"\n\n",
        b"[" * 5000,
        b"{",
        b'"',
        b"\xed\xa0\x80",
        draw.randbytes(30),
        b"PK\x05\x06",
        b"-1",
        b"9" * 5000,
    ]
    file.write_bytes(content[:a] + draw.choice(odd) + content[a:])


def repeat(draw: Draw, file: Path) -> None:
    content = file.read_bytes()
    a, b = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    file.write_bytes(content[:b] + content[a:])


def noise(draw: Draw, file: Path) -> None:
    content = bytearray(file.read_bytes())
    for i in range(len(content)):
        if draw.random() < 0.02:
            content[i] = draw.randrange(256)
    file.write_bytes(content)


def number(draw: Draw, file: Path) -> None:
    """Sizes and places in headers are numbers of two, four and eight bytes."""
    content, width = bytearray(file.read_bytes()), draw.choice([2, 4, 8])
    a = draw.randrange(min(len(content), 64) + 1) if draw.random() < 0.5 else draw.randrange(len(content) + 1)
    content[a : a + width] = draw.choice([b"\xff" * width, b"\0" * width, b"\x7f" + b"\xff" * (width - 1)])
    file.write_bytes(content)


def empty(draw: Draw, file: Path) -> None:
    file.write_bytes(draw.choice([b"", b"\0", b"\n", b"null", b"[]", b"{}", b"0", b"\xef\xbb\xbf", b'"x"']))


def values(draw: Draw, file: Path) -> None:
    """Another value somewhere in JSON, or in each line of it."""
    try:
        rows = [json.loads(row) for row in file.read_text().split("\n") if row] if file.suffix == ".jsonl" else None
        whole = rows if rows is not None else json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return flip(draw, file)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(whole)
    if places:
        node, key = draw.choice(places)
        action = draw.randrange(4)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            node[draw.choice(["auto_map", "x", "", "tensor of this file", "__class__"])] = draw.choice(ODD)
        else:
            node[key] = draw.choice(ODD)
    text = "\n".join(map(json.dumps, whole)) if rows is not None else json.dumps(whole)
    file.write_text(text)


def swap(draw: Draw, file: Path) -> None:
    other = draw.choice(sorted(place for place in file.parent.iterdir() if place.is_file()))
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


def strange(draw: Draw, file: Path) -> None:
    """Something else of that name: nothing, a folder, a pipe, a socket, a device, a link that leads nowhere, itself."""
    kind = draw.choice(["nothing", "folder", "pipe", "socket", "zero", "tty", "dangling", "circle", "parent", "self"])
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(file.parent)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
        os.chdir(here)
    elif kind != "nothing":
        ends = {
            "zero": "/dev/zero",
            "tty": "/dev/tty",
            "dangling": "gone",
            "circle": file.name,
            "parent": "..",
            "self": ".",
        }
        file.symlink_to(ends[kind])


def rename(draw: Draw, file: Path) -> None:
    name = draw.choice([".hidden", "other", file.name.upper(), "é", "x\ny", "a" * 200, file.stem, f"{file.name}.gz"])
    file.rename(file.with_name(name))


def pickled(draw: Draw, file: Path) -> None:
    canary = Canary(file.parent / CANARY)
    while not canary.path.parent.joinpath("here").exists():  # the folder that is read lies in the sandbox
        canary.path = canary.path.parent.parent / CANARY
    if draw.random() < 0.5:
        file.write_bytes(pickle.dumps(canary))
    else:
        with file.open("wb") as out:  # torch refuses to write some names itself
            torch.save({"w": canary}, out)


def rezipped(draw: Draw, file: Path) -> None:
    """A zip with an entry that is odd: its name, its kind, its flags, what it says of itself."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist() if not info.is_dir()]
    except Exception:
        return flip(draw, file)
    chosen = draw.randrange(len(entries) or 1)
    names = ["../../evil", "/evil", "C:\\evil", "..\\evil", "x\0y", "", ".", "a/../b", "x" * 300, "é", "\u202e", "a//b"]
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", draw.choice([0, 8, 12, 14])) as archive:
        warnings.simplefilter("ignore")  # names twice
        for i, (name, content) in enumerate(entries):
            info = zipfile.ZipInfo(name)
            if i == chosen:
                kind = draw.choice(["name", "twice", "link", "nested", "comment", "extra", "bomb", "folder", "suffix"])
                if kind == "name":
                    info.filename = draw.choice(names)
                elif kind == "suffix":
                    info.filename = draw.choice(names) + name
                elif kind == "twice":
                    archive.writestr(name, draw.choice([content, b"other"]))
                elif kind == "link":
                    info.external_attr, content = (
                        0o120777 << 16,
                        draw.choice([b"/dev/zero", b"../../evil", name.encode()]),
                    )
                elif kind == "nested":
                    content = file.read_bytes() or b"PK"
                elif kind == "comment":
                    info.comment = archive.comment = b"x" * 999
                elif kind == "extra":
                    info.extra = draw.choice(
                        [b"\x01\x00\x08\x00" + b"\xff" * 8, b"\x01\x00\x00\x00", b"\x01", b"\x75\x70\x01\x00\x01"]
                    )
                elif kind == "bomb":
                    info.compress_type, content = 8, content + bytes(3_000_000)
                else:
                    info.filename += "/"
            archive.writestr(info, content)
    content = bytearray(file.read_bytes())
    marks = [m.start() for m in re.finditer(rb"PK\x01\x02", content)]
    if (
        marks and draw.random() < 0.5
    ):  # versions, flags, methods, checksums, sizes and places, as the directory has them
        at = draw.choice(marks) + draw.choice([4, 6, 8, 10, 16, 20, 24, 28, 30, 32, 34, 38, 42])
        content[at : at + 2] = draw.choice([b"\1\0", b"\0\0", b"\xff\xff", b"\x63\0", b"\x08\x08", b"\0\x80"])
        file.write_bytes(content)


def resaved(draw: Draw, file: Path) -> None:
    """Tensors by other names, of other shapes and types, or an odd header: whole, with the right checksum."""
    try:
        tensors, header = store.load_tensors(file)
    except (ValueError, FileNotFoundError):
        return flip(draw, file)
    if tensors and draw.random() < 0.5:
        name = draw.choice([*tensors])
        tensor = tensors.pop(name)
        odd = [tensor.flatten(), tensor.to(torch.float16), tensor[..., None], tensor[None].repeat_interleave(2, 0)]
        tensors |= draw.choice([{}, {f"{name}x": tensor}, {name: draw.choice(odd)}])
    else:
        text = file.with_suffix(".header")
        whole = {**header, "tree": json.loads(header["tree"])} if "tree" in header else header
        text.write_text(json.dumps(whole))
        values(draw, text)
        with suppress(ValueError):
            header = json.loads(text.read_text())
        text.unlink()
        if isinstance(header, dict) and "tree" in header:
            header["tree"] = json.dumps(header["tree"])
    store.save_tensors(file, tensors, header if isinstance(header, dict) else {})


DAMAGES: list[Callable[[Draw, Path], None]] = [
    flip, cut, insert, repeat, noise, number, empty, values, values, values, swap, strange, strange, rename, pickled,
]  # fmt: skip


def damage(draw: Draw, folder: Path) -> str:
    """Damages one or two files; says how."""
    done = []
    for _ in range(draw.choice([1, 1, 2])):
        files = sorted(
            place for place in folder.rglob("*") if place.is_file() and not place.is_symlink() and place.suffix != ".py"
        )
        if not files:
            break
        file = draw.choice(files)
        special = {".zip": [rezipped] * 12, ".safetensors": [resaved] * 8}.get(file.suffix, [])
        kind = draw.choice([*DAMAGES, *special])
        kind(draw, file)
        done.append(kind.__name__)
    return " and ".join(done)


class Waits(BaseException):
    """Nothing that explains exceptions explains this one."""


def pages() -> int:
    """The bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def watched(seconds: float = ENDLESS) -> Iterator[None]:
    """Fails instead of waiting for ever, or filling the memory."""

    def stop(*_: Any) -> None:
        raise Waits("for ever")

    before, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + pages(), limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def seen(value: Any) -> Any:
    """What was read, in texts and hashes."""
    if isinstance(value, torch.Tensor):
        return store.hash_tensor(value)
    if isinstance(value, data.Dataset):
        return [value.classes, *(seen(t) for part in (value.train, value.test) for t in (part.x, part.y))]
    if isinstance(value, torch.nn.Module):
        return seen(value.state_dict())
    if isinstance(value, dict):
        return {key: seen(item) for key, item in value.items()}
    return [seen(item) for item in value] if isinstance(value, list | tuple) else repr(value)


class Sandbox:
    """A folder with good inputs of a reader; each trial damages a fresh copy and reads it."""

    def __init__(self, name: str, root: Path):
        self.name, self.reader, self.root = name, READERS[name], root
        self.good, self.place = root / "good", root / "outer" / "inner" / "input"
        self.good.mkdir(parents=True)
        self.place.parent.mkdir(parents=True)
        (self.place.parent / "here").touch()
        self.reader.make(self.good)
        self.canary = self.place.parent / CANARY
        if name in ("huggingface", "tokenizer"):
            (self.good / "own.py").write_text(CODE.format(canary=str(self.canary)))
        self.expected = seen(self.reader.read(self.good)) if self.reader.sealed else None
        self.before = self.listing()

    def listing(self) -> set[str]:
        return {str(p) for p in self.root.rglob("*") if not {self.place, self.root / "cache"} & {p, *p.parents}}

    def trial(self, draw: Draw) -> str:
        """Gives "read" or "refused"; raises what is no error of ours, and AssertionError for what must not be."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.good, self.place)
        flipped = self.reader.sealed and draw.random() < 0.25
        if flipped:
            flip(draw, draw.choice(sorted(p for p in self.place.rglob("*") if p.is_file())))
        how = "flip" if flipped else damage(draw, self.place)
        outcome = "read"
        try:
            with watched(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self.reader.read(self.place)
            if self.reader.read is not command and found == 2:
                outcome = "refused"
        except Exception as error:
            if not is_ours(error):
                error.add_note(f"{self.name}: {how}")
                raise
            outcome = "refused"
        else:
            assert not flipped or seen(found) == self.expected, f"{self.name}: a flipped bit is read as another input"
        assert self.listing() == self.before, f"{self.name}: {how}: run or written outside"
        return outcome


def check(name: str, root: Path, draws: int) -> Counter[str]:
    sandbox, counts = Sandbox(name, root), Counter()

    @settings(QUICK, max_examples=draws)
    @given(st.randoms(use_true_random=True))
    def trial(draw: Draw) -> None:
        counts[sandbox.trial(draw)] += 1

    trial()
    return counts


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", READERS)
def test_damaged_input_is_read_right_or_refused_in_words(name: str, tmp_path: Path):
    assert check(name, tmp_path, DRAWS).total() >= DRAWS


@pytest.mark.slow
def test_a_long_run_over_all_readers(tmp_path: Path):
    counts = {name: check(name, tmp_path / str(i), max(DRAWS, 800)) for i, name in enumerate(READERS)}
    for name, count in counts.items():
        print(f"{name:<20} {count['read']:>6} read, {count['refused']:>6} refused")
    print(f"{sum(count.total() for count in counts.values())} inputs")


# --- odd arguments ---


@functools.cache
def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Public entry points with good arguments, of which a draw makes one odd."""
    stream, pixels, dataset = toys.stream(2), toys.images(2), data.digits()
    net, x = models.mlp(stream, (4,)), torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    first, second = get_weights(net), get_weights(models.mlp(stream, (4,), seed=1))
    pair, fine = [first, second], Training(epochs=0)
    moves = alignment.symmetry(net, x)
    two = data.Dataset("d", pixels[0].train, pixels[0].test, ("a", "b"))
    numbers = np.array([[0.9, 0.1], [0.5, 0.8]])
    table = pd.DataFrame({"method": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1], "acc": [0.1, 0.2, 0.3, 0.5]})
    quiet = {"device": "cpu", "progress": False}
    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "text_file": (data.text_file, {"path": "none.txt", "test": None, "fields": ("text",), "tokenizer": None}),
        "texts": (data.texts, {"name": "math", "path": None, "context": 8, "limit": 2, "tokenizer": None}),
        "folder": (data.folder, {"path": "none", "domain": None, "size": 4, "augment": data.NO_AUGMENT, "seed": 0}),
        "folders": (data.folders, {"path": "none"}),
        "load": (data.load, {"name": "own", "root": None, "size": 4, "augment": None, "download": False}),
        "Examples": (data.Examples, {"x": x, "y": [0, 1, 0, 1, 0, 1]}),
        "Dataset": (data.Dataset, vars(two)),
        "Task": (data.Task, {n: v for n, v in vars(stream[0]).items() if n != "facts"}),
        "Stream": (data.Stream, {"name": "s", "tasks": stream.tasks, "classes": stream.classes, "scenario": "class"}),
        "Normalize": (data.Normalize, {"mean": (0.5,), "std": (1.0,)}),
        "Augment": (data.Augment, {"crop": 1, "flip": True, "shift": 1}),
        "split": (data.split, {"dataset": dataset, "tasks": 5, "order": 1, "scenario": "class"}),
        "domains": (data.domains, {"datasets": [two, two], "normalize": None}),
        "series": (data.series, {"datasets": [two, two], "scenario": "task", "normalize": None}),
        "permuted": (data.permuted, {"dataset": two, "tasks": 2, "share": 0.5, "seed": 0}),
        "rotated": (data.rotated, {"dataset": two, "angles": (0, 20)}),
        "conflicting": (data.conflicting, {"dataset": two, "conflict": 0.5, "seed": 0}),
        "run": (
            run,
            {"stream": stream, "model": net, "learner": None, "consolidation": None, "training": fine, "seed": 0,
             "keep": True, "resume": None, "checkpoint": None, **quiet},
        ),
        "evaluate": (evaluate, {"model": net, "stream": stream, "batch": 8}),
        "Method": (experiments.Method, {"learner": Learner(), "consolidation": None, "training": fine, "model": net}),
        "summarise": (experiments.summarise, {"table": table, "by": "method", "value": "acc", "level": 0.9}),
        "paired_difference": (experiments.paired_difference, {"table": table, "a": "a", "b": "b", "value": "acc"}),
        "symmetry": (alignment.symmetry, {"model": net, "example": x}),
        "align": (
            alignment.align,
            {"symmetry": moves, "model": net, "reference": first, "moving": second, "inputs": x},
        ),
        "lerp": (functools.partial(weights.lerp, t=0.5), {"a": first, "b": second}),
        "set_weights": (weights.set_weights, {"model": net, "weights": first}),
        "merge": (merging.merge, {"name": "average", "ws": pair, "base": first}),
        "Memory": (memory.Memory, {"capacity": 4}),
        "huggingface": (models.huggingface, {"stream": stream, "path": "none"}),
        "features": (models.features, {"model": net, "x": x, "layer": None, "weights": None, "batch": 4}),
        "interpolation": (
            landscape.interpolation,
            {"model": net, "stream": stream, "old": first, "new": second, "inputs": x, "ts": 3},
        ),
        "fisher": (curvature.fisher, {"model": net, "x": x, "labels": "exact", "y": None}),
        "refresh": (normalization.refresh, {"model": net, "weights": first, "inputs": x}),
        "Training": (Training, {n: v for n, v in vars(Training()).items()}),
        "Modulated": (Modulated, {"backbone": backbone(), "rule": Modulation(2, 2)}),
    }  # fmt: skip
    for name in ("acc", "last", "forgetting", "bwt", "plasticity", "summary"):
        found[f"metrics.{name}"] = (getattr(metrics, name), {"matrix": numbers})
    found["metrics.summary"] = (functools.partial(metrics.summary, initial=np.array([0.1, 0.1])), {"matrix": numbers})
    for name in ("average", "slerp", "task_arithmetic", "ties", "dare", "breadcrumbs", "magmax", "tsv", "opcm"):
        merge = getattr(merging, name)
        takes = inspect.signature(merge).parameters
        found[f"merging.{name}"] = (merge, {n: {"ws": pair, "base": first}.get(n, p.default) for n, p in takes.items()})
    for name, factory in {"mlp": models.mlp, "gpt": models.gpt, "convnet": models.convnet, "vit": models.vit}.items():
        found[f"models.{name}"] = (factory, defaults(factory) | {"stream": language() if name == "gpt" else pixels})
    for kind in [*LEARNERS.values(), *consolidation.CONSOLIDATIONS.values(), *modulation.RULES.values()]:
        found[kind.__name__] = (kind, defaults(kind))
    return {name: call for name, call in found.items() if call[1]}


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    taken = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in taken if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


@functools.cache
def odd_arguments() -> list[Any]:
    x = torch.arange(6.0).view(2, 3)
    return [
        *ODD, b"x", (), object(), lambda: 0, Path("none"), Path("/dev/zero"), {1}, int, range(3),
        np.float32(0.5), np.int8(1),
        np.array(["a"]), np.zeros((2, 2)), np.array(float("nan")), x, x.long(), x > 2, x * float("nan"), x[:0], x[0, 0],
        [x, x], {"a": x}, [{"a": x}, {"b": x}],
        torch.nn.Linear(2, 2), models.mlp, toys.stream(1), toys.images(1), data.digits(), Learner(), Training, Learner,
        consolidation.CLeWI(), pd.DataFrame(), [[0.5, "a"]], (1, 2), "a,b", 1e-320, -0.0, Exception("x"), iter([1]),
    ]  # fmt: skip


def call_oddly(name: str, draw: Draw) -> str:
    """Calls an entry point with one argument odd."""
    function, arguments = calls()[name]
    place = draw.choice([*arguments])
    odd = draw.choice(odd_arguments())
    try:
        with watched(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**{**arguments, place: odd})
    except Exception as error:
        networks = isinstance(error, RuntimeError) and place in ("x", "inputs", "example")  # its own words about shapes
        if not is_ours(error) and not networks:
            error.add_note(f"{name}({place}={odd!r:.80})")
            raise
        return "refused"
    return "taken"


@settings(QUICK, max_examples=20 * DRAWS)
@given(st.randoms(use_true_random=True))
def test_odd_arguments_are_taken_right_or_refused_in_words(draw: Draw):
    call_oddly(draw.choice([*calls()]), draw)

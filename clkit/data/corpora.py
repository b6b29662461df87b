"""The documents behind texts: Math, Law and Code from what every machine has, and from JSON lines of real ones."""

import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile, is_zipfile

ENOUGH = 30_000  # bytes of embedded text that make a task
CODE = 1_000_000  # bytes of embedded code
HELD_OUT = 0.1  # the share of documents to test on where a text has no test part of its own
PAIRS = 256  # of the 4,095 pairs of numbers whose sums are embedded, those held out


class Problem(NamedTuple):
    """A held-out problem: what is shown, a solution to it, and the mark in it behind which the answer stands."""

    prompt: str
    solution: str
    marker: str

    @property
    def answer(self) -> str:
        """The rest of the line behind the solution's first marker."""
        return self.answer_in(self.solution) or ""

    def answer_in(self, text: str) -> str | None:
        """The rest of the line behind the first marker of some text; None if that has no marker or no line's end."""
        line, end, _ = text.partition(self.marker)[2].partition("\n")
        return line.strip() if end else None


class Part(NamedTuple):
    """Documents to train on and to test on, and problems among the latter."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    problems: tuple[Problem, ...] = ()


def hold_out(documents: Iterable[str], source: str) -> Part:
    """Part documents by their contents alone, so that every machine parts the same ones alike; copies count once."""
    ordered = sorted(dict.fromkeys(documents), key=_digest)
    if len(ordered) < 2:
        raise ValueError(f"{source} has {len(ordered)} documents: give two or more, one to train and one to test on")
    count = max(1, int(HELD_OUT * len(ordered)))
    return Part(tuple(ordered[count:]), tuple(ordered[:count]))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def rows_of(text: str) -> list[dict[str, Any]]:
    """The rows of JSON lines."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]  # strings may hold other ends of lines


def _found(path: Path, *names: str) -> list[list[dict[str, Any]]]:
    """The rows of JSON-lines files, wherever they are in a folder or a zip."""
    if path.is_dir():
        places = {place.name: place.read_bytes for place in sorted(path.rglob("*.jsonl"))}
    elif path.exists() and is_zipfile(path):
        archive = ZipFile(path)
        places = {Path(place).name: lambda place=place: archive.read(place) for place in sorted(archive.namelist())}
    else:
        raise ValueError(f"path={str(path)!r} is neither a folder nor a zip; for a file of your own use text_file()")
    missing = [name for name in names if name not in places]
    if missing:
        raise ValueError(f"path={str(path)!r} has no {' and no '.join(missing)}; for files of your own use text_file()")
    return [rows_of(places[name]().decode()) for name in names]


@lru_cache(maxsize=1)
def _sums() -> Part:
    """Sums of numbers of two digits; a pair is on the same side in both orders."""
    pairs = sorted(((a, b) for a in range(10, 100) for b in range(10, a + 1)), key=lambda pair: _digest(repr(pair)))

    def both(chosen: list[tuple[int, int]]) -> tuple[Problem, ...]:
        ordered = sorted({turn for a, b in chosen for turn in ((a, b), (b, a))}, key=lambda pair: _digest(repr(pair)))
        return tuple(_sum(a, b) for a, b in ordered)

    test, train = both(pairs[:PAIRS]), both(pairs[PAIRS:])
    return Part(_whole(train), _whole(test), test)


def _whole(problems: Iterable[Problem]) -> tuple[str, ...]:
    return tuple(problem.prompt + problem.solution for problem in problems)


def _sum(a: int, b: int) -> Problem:
    units = a % 10 + b % 10
    carry = "+1" if units > 9 else ""
    tens = a // 10 + b // 10 + units // 10
    steps = f"{a % 10}+{b % 10}={units},{a // 10}+{b // 10}{carry}={tens}"
    return Problem(f"{a}+{b}:", f"{steps}#{a + b}\n", "#")


@lru_cache(maxsize=1)
def _licences() -> Part:
    """Licence texts, each paragraph once: many packages share a licence but for its copyright line."""
    wanted = re.compile(r"(licen[cs]e|copying|notice)[^/]*?(\.txt|\.md|\.rst)?", re.IGNORECASE)
    places = {Path(sysconfig.get_path("stdlib"), "LICENSE.txt")}
    for package in metadata.distributions():
        files = (file for file in package.files or () if wanted.fullmatch(file.name))
        places |= {Path(str(package.locate_file(file))) for file in files}
    found = sorted({text for place in places if (text := _read(place))})
    seen: set[str] = set()
    documents = []
    for text in found:
        fresh = []
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(re.findall(r"\w+", paragraph.lower()))
            if words and words not in seen and not words.startswith("copyright"):
                seen.add(words)
                fresh.append(paragraph.strip("\n"))
        if sum(map(len, fresh)) > 200:
            documents.append("\n\n".join(fresh))
    _enough("law", documents)
    return hold_out(documents, "law")


@lru_cache(maxsize=1)
def _modules() -> Part:
    """Modules of the standard library, in the order of their names' hashes, as many as fit `CODE`."""
    documents, total = [], 0
    for place in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda place: _digest(place.name)):
        text = _read(place)
        if text and total + len(text) <= CODE:
            documents.append(text)
            total += len(text)
    _enough("code", documents)
    return hold_out(documents, "code")


def _read(place: Path) -> str:
    """A file's text, or nothing where it cannot be read."""
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _enough(name: str, documents: Sequence[str]) -> None:
    size = sum(map(len, documents))
    if size < ENOUGH:
        raise ValueError(
            f"name={name!r}: this machine has {size} bytes of embedded text and a task needs {ENOUGH}; give a folder "
            "or a zip of real texts as path=, or a file of your own to text_file()"
        )


def _gsm8k(path: Path) -> Part:
    def problems(rows: list[dict[str, Any]]) -> tuple[Problem, ...]:
        return tuple(Problem(f"{r['question']}\n", re.sub("<<.*?>>", "", r["answer"]) + "\n", "####") for r in rows)

    train, test = (problems(rows) for rows in _found(path, "gsm8k_train.jsonl", "gsm8k_test.jsonl"))
    return Part(_whole(train), _whole(test), test)


def _uscode(path: Path) -> Part:
    train, test = (
        tuple(f"{row['heading']}\n{row['text']}" for row in rows)
        for rows in _found(path, "uscode_train.jsonl", "uscode_test.jsonl")
    )
    return Part(train, test)


def _programs(path: Path) -> Part:
    train, test = _found(path, "mbpp.jsonl", "humaneval.jsonl")
    learned = (f'"""{row["text"]}"""\n{row["code"]}'.replace("\r\n", "\n") for row in train)
    return Part(tuple(learned), tuple(row["prompt"] + row["canonical_solution"] for row in test))


TEXTS: dict[str, tuple[Callable[[], Part], Callable[[Path], Part]]] = {
    "math": (_sums, _gsm8k),
    "law": (_licences, _uscode),
    "code": (_modules, _programs),
}

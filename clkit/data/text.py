"""Texts as tokens: Math, Law and Code, embedded or real, and anyone's files; bytes, or the tokens of a tokenizer.

A text dataset has windows of tokens x (N, L) and the next token of each as target y (N, L). A window begins where a
document begins, or goes on with the one that did not fit the window before it; documents that fit share a window, and
none that would fit is cut. What is left of a window has no target (-100). Every document ends in a newline.
Documents are parted into training and test ones as a whole, so that no window of one part overlaps any of the other.
"""

import hashlib
import json
import lzma
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from clkit import checks, store
from clkit.data.core import IGNORED, Dataset, Examples
from clkit.data.images import files, regular_files

RUN = 8  # words in a row that make a licence's paragraph another's
SECTION = 2000  # characters of a licence after which the next paragraph begins a section
HELD_OUT = 0.1  # the share of documents to test on where a text has no test part of its own
SUMS_HELD_OUT = 256  # of the 4,095 pairs of numbers whose sums are embedded
LOCAL = {"local_files_only": True, "trust_remote_code": False}  # what transformers is told about a folder
Context = Annotated[int, checks.Range(1, 10**5)]
_BYTES = tuple(chr(i) if 32 < i < 127 else f"0x{i:02x}" for i in range(256))  # the names of the byte classes


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


class Corpus(NamedTuple):
    """Documents to train on and to test on, and problems among the latter."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Text(Dataset):
    """A dataset of tokens, with what tells about the text behind them.

    `bytes_per_token` is how many bytes the targets of the test part stand for, a mean (1 for bytes): see
    `bits_per_byte`. `problems` are those of the test part that `exact_match` can be asked about. `tokenizer` is the
    folder that the tokens come from, None for bytes.
    """

    bytes_per_token: float = 1.0
    problems: tuple[Problem, ...] = ()
    tokenizer: str | None = None

    def __repr__(self) -> str:
        tokens = f"{len(self.classes)} tokens of {self.tokenizer}" if self.tokenizer else "bytes"
        return f"Text({self.name!r}, train {self.train}, test {self.test}, {tokens}, {len(self.problems)} problems)"

    def encode(self, text: str) -> list[int]:
        """The tokens of some text."""
        return _encoder(self.tokenizer)(text)[0].tolist()

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; bytes that are no UTF-8 become question marks."""
        if self.tokenizer is None:
            return bytes(tokens).decode(errors="replace")
        return _tokenizer(self.tokenizer).decode(tokens, clean_up_tokenization_spaces=False)


@checks.arguments
def texts(
    name: str,
    *,
    path: str | Path | None = None,
    context: Context = 64,
    limit: checks.Count | None = None,
    test_limit: checks.Count | None = 256,
    tokenizer: str | Path | None = None,
) -> Text:
    """Give "math", "law" or "code" as windows of `context` tokens: embedded stand-ins, or real texts below `path`.

    Embedded, without `path` and without any download, the same on every machine:
    - math: all sums of two numbers from 10 to 99 with their steps, as in "47+38:7+8=15,4+3+1=8#85"; those of 256 pairs
      are held out, in both orders, and are the problems
    - law: sections of licences of free software, each paragraph once
    - code: modules of Python's standard library, a quarter of a megabyte

    Real, from JSON lines anywhere in a folder or a zip:
    - math: GSM8K, gsm8k_train.jsonl and gsm8k_test.jsonl: question, newline, answer without its calculator notes
      (<<...>>); the problems ask for the number behind "####"
    - law: uscode_train.jsonl and uscode_test.jsonl: heading, newline, text
    - code: MBPP to train on, mbpp.jsonl: the task as a docstring, newline, code; HumanEval to test on,
      humaneval.jsonl: prompt and canonical solution

    `limit` and `test_limit` keep so many windows of a part, the first ones. `tokenizer` is a folder with a fast
    tokenizer of transformers; None takes bytes, 256 classes. The stream of all three is `domains({"math":
    texts("math"), "law": texts("law"), "code": texts("code")})`.

    Raises FileNotFoundError for a missing path. Raises ValueError for an unknown name, a path without the files, and
    files that are damaged.
    """
    embedded, marker, train, test = TEXTS[checks.choice("name", name, TEXTS)]
    corpus = embedded() if path is None else _real(path, marker, train, test)
    return _dataset(name, corpus, context, limit, test_limit, tokenizer)


@checks.arguments
def text_file(
    path: str | Path,
    test: str | Path | None = None,
    *,
    fields: Sequence[str] = ("text",),
    context: Context = 64,
    limit: checks.Count | None = None,
    test_limit: checks.Count | None = 256,
    tokenizer: str | Path | None = None,
) -> Text:
    """Read anyone's UTF-8 text: JSON lines (.jsonl), a document a row, or any other, documents between blank lines.

    A row's `fields`, texts or numbers, make its text, joined by newlines. `test` is a file to test on; without it a
    tenth of the documents is held out, at least one, chosen by their contents. The other arguments are those of
    `texts`.

    Raises FileNotFoundError for missing files. Raises ValueError for missing fields, for what is no file, no UTF-8, no
    text or other JSON, and for fewer than two documents.
    """
    train = _documents("path", path, fields)
    corpus = _parted(train, f"path: {path}") if test is None else Corpus(train, _documents("test", test, fields))
    return _dataset(store.expand(path).stem, corpus, context, limit, test_limit, tokenizer)


def local_only(argument: str, path: str | Path) -> tuple[Any, str]:
    """Give the package transformers (ImportError where it is missing) and the folder `path` (ValueError)."""
    transformers = checks.package("transformers", "huggingface", f"{argument}: {str(path)!r}")
    if not (folder := store.expand(path)).is_dir():
        raise ValueError(f"{argument}: {str(path)!r} is no folder; give one of save_pretrained, nothing is downloaded")
    with foreign(f"{argument}: {str(path)!r} cannot be read"):
        regular_files(folder)
    return transformers, str(folder)


def foreign(what: str) -> AbstractContextManager[None]:
    """Says what errors of transformers mean, with the remedy for folders that need code of their own, or pickles."""
    remedy = "save one there with save_pretrained, as safetensors; code and pickles of a folder are not run"
    return checks.explained(what, remedy)


def _dataset(
    name: str, corpus: Corpus, context: int, limit: int | None, test_limit: int | None, tokenizer: str | Path | None
) -> Text:
    folder = None if tokenizer is None else str(store.expand(tokenizer))
    encode = _encoder(folder)
    train, _ = _windows(corpus.train, encode, context, limit)
    test, width = _windows(corpus.test, encode, context, test_limit)
    classes = _BYTES if folder is None else _names(folder)
    return Text(name, train, test, classes, bytes_per_token=width, problems=corpus.problems, tokenizer=folder)


def _windows(
    documents: Iterable[str], encode: Callable[[str], tuple[np.ndarray, np.ndarray]], context: int, limit: int | None
) -> tuple[Examples, float]:
    """Cut documents into windows (N, context); also the mean number of bytes that a target stands for."""
    tokens: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    spans: list[tuple[int, int]] = []  # of the tokens of all documents, one after the other
    start = end = 0
    for document in documents:
        if limit is not None and len(spans) >= limit:
            break
        ids, size = encode(document.rstrip() + "\n")
        tokens.append(ids)
        sizes.append(size)
        begin, end = end, end + len(ids)
        if end - start > context + 1 and begin > start:
            spans.append((start, begin))
            start = begin
        while end - start > context + 1:
            spans.append((start, start + context + 1))
            start += context
    spans = [span for span in [*spans, (start, end)] if span[1] - span[0] > 1][:limit]
    if not spans:
        raise ValueError("documents: none has two tokens; give a longer text")
    first, last = np.array(spans).T
    place = first[:, None] + np.arange(context + 1)
    every = np.concatenate(tokens)[np.minimum(place, last[:, None] - 1)]
    inside = place < last[:, None]
    x, y = np.where(inside, every, 0)[:, :-1], np.where(inside, every, IGNORED)[:, 1:]
    total = np.cumsum(np.concatenate([[0], *sizes]))
    width = (total[last] - total[first + 1]).sum() / (last - first - 1).sum()
    return Examples(torch.from_numpy(x.copy()), torch.from_numpy(y.copy())), float(width)


def _encoder(tokenizer: str | None) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """What turns text into tokens and the number of bytes that each stands for, both int64."""
    if tokenizer is None:
        return _bytes
    fast = _tokenizer(tokenizer)

    def encode(text: str) -> tuple[np.ndarray, np.ndarray]:
        found = fast(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        width = np.cumsum([0, *(len(c.encode()) for c in text)])
        ends = np.maximum.accumulate(np.array([0, *(end for _, end in found["offset_mapping"])]))
        return np.array(found["input_ids"], np.int64), np.diff(width[ends])

    return encode


def _bytes(text: str) -> tuple[np.ndarray, np.ndarray]:
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    return ids, np.ones_like(ids)


@lru_cache(maxsize=4)
def _tokenizer(path: str) -> Any:
    transformers, _ = local_only("tokenizer", path)
    with foreign(f"tokenizer: {path!r} has no tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **LOCAL)
        tokenizer("a word", add_special_tokens=False)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: {path!r} is slow and cannot place its tokens in a text; use a fast one")
    return tokenizer


def _names(path: str) -> tuple[str, ...]:
    tokenizer = _tokenizer(path)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return tuple(f"<{i}>" if name is None else name for i, name in enumerate(names))


def _documents(argument: str, path: str | Path, fields: Sequence[str]) -> tuple[str, ...]:
    source, suffix = f"{argument}: {str(path)!r}", store.expand(path).suffix.lower()
    if suffix == ".json":
        raise ValueError(f"{source} is one JSON value; write its documents as rows of a .jsonl file")
    text = _utf8(store.content(path, argument, "give a file of text"), source)
    if suffix in (".jsonl", ".ndjson"):
        found = ["\n".join(str(row[field]) for field in fields) for row in _json_rows(text, source, fields)]
    else:
        found = re.split(r"\n\s*\n", re.sub("\r\n?", "\n", text))
    documents = tuple(document.strip("\n") for document in found if document.strip())
    if not documents:
        raise ValueError(f"{source} has no text; give a file with documents")
    return documents


def _parted(documents: Iterable[str], source: str) -> Corpus:
    """Part documents by their contents alone, so that every machine parts the same ones alike; copies count once."""
    ordered = sorted(dict.fromkeys(documents), key=_digest)
    if len(ordered) < 2:
        raise ValueError(f"{source} has {len(ordered)} documents; give two or more, one to train and one to test on")
    count = max(1, int(HELD_OUT * len(ordered)))
    return Corpus(tuple(ordered[count:]), tuple(ordered[:count]))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _utf8(content: bytes, source: str) -> str:
    """The text of a file, without the mark that some editors put before it."""
    with checks.explained(f"{source} is no UTF-8 text", "save it as UTF-8"):
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it has null bytes, as binary files have")
    return text


def _json_rows(text: str, source: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of JSON lines, each with all `fields`."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # strings may hold other ends of lines
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half of a pair, as in "\ud800", is no text
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object ({line:.40}); write one a line")
        if lacking := [field for field in fields if not isinstance(row.get(field), str | int | float)]:
            raise ValueError(f"fields: {lacking} are no texts in {where}; its rows have {', '.join(row)}")
        rows.append(row)
    return rows


def _real(path: str | Path, marker: str, *sources: tuple[str, str, str]) -> Corpus:
    """Documents of two of `TEXTS`' files, wherever they are in a folder or a zip; problems if answers have a marker."""
    tree, parts = files(path), []
    for name, prompt, solution in sources:
        places = [inside for inside in tree if f"/{inside}".endswith(f"/{name}.jsonl")]
        if len(places) != 1:
            have = f"several, {', '.join(places)}" if places else f"no {name}.jsonl"
            raise ValueError(f"path: {str(path)!r} has {have}; give one, or your own files to text_file()")
        source = f"path: {places[0]!r}"
        rows = _json_rows(_utf8(tree[places[0]].read(), source), source, re.findall(r"{(\w+)}", prompt + solution))
        texts = ([text.format_map(row).replace("\r\n", "\n") for text in (prompt, solution)] for row in rows)
        notes = "<<.*?>>" if marker else "(?!)"  # of GSM8K's calculator; (?!) is found nowhere
        parts.append(tuple(Problem(asked, re.sub(notes, "", solved), marker) for asked, solved in texts))
    corpus = _solved(*parts)
    return corpus if marker else corpus._replace(problems=())


@lru_cache(maxsize=1)
def _sums() -> Corpus:
    """Sums of numbers of two digits; a pair is on the same side in both orders."""
    pairs = sorted(((a, b) for a in range(10, 100) for b in range(10, a + 1)), key=lambda pair: _digest(repr(pair)))

    def both(chosen: list[tuple[int, int]]) -> tuple[Problem, ...]:
        ordered = sorted({turn for a, b in chosen for turn in ((a, b), (b, a))}, key=lambda pair: _digest(repr(pair)))
        return tuple(_sum(a, b) for a, b in ordered)

    return _solved(both(pairs[SUMS_HELD_OUT:]), both(pairs[:SUMS_HELD_OUT]))


def _solved(train: tuple[Problem, ...], test: tuple[Problem, ...]) -> Corpus:
    """Documents that are problems with their solutions."""
    learned, asked = (tuple(problem.prompt + problem.solution for problem in part) for part in (train, test))
    return Corpus(learned, asked, test)


def _sum(a: int, b: int) -> Problem:
    units = a % 10 + b % 10
    carry = "+1" if units > 9 else ""
    tens = a // 10 + b // 10 + units // 10
    steps = f"{a % 10}+{b % 10}={units},{a // 10}+{b // 10}{carry}={tens}"
    return Problem(f"{a}+{b}:", f"{steps}#{a + b}\n", "#")


@lru_cache(maxsize=1)
def _licences() -> Corpus:
    """Sections of licences without what an earlier one says: a paragraph goes if it has `RUN` words of another's.

    Many licences share paragraphs but for a copyright line, or for a name in the midst of them.
    """
    seen: set[tuple[str, ...]] = set()
    sections = []
    for text in _embedded("law"):
        fresh, said = [""], set[tuple[str, ...]]()
        for paragraph in re.split(r"\n\s*\n", text):
            words = re.findall(r"\w+", paragraph.lower())
            runs = {tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}
            if words and words[0] != "copyright" and not runs & seen:
                said |= runs
                fresh += [""] if len(fresh[-1]) > SECTION else []
                fresh[-1] += paragraph.strip("\n") + "\n\n"
        seen |= said
        sections += fresh
    return _parted(filter(None, sections), "law")


def _modules() -> Corpus:
    """Modules of Python's standard library."""
    return _parted(_embedded("code"), "code")


@lru_cache(maxsize=1)
def _embedded(part: str) -> list[str]:
    """Texts that come with clkit: licences by name, and modules of Python 3.11.7, whose licence is among these."""
    with lzma.open(Path(__file__).with_name("texts.jsonl.xz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row["text"] for row in sorted(rows, key=itemgetter("name")) if row["part"] == part]


_GSM8K = ("{question}\n", "{answer}\n")
# What is embedded; what stands before answers; the files to train and to test on, with what is shown and its solution.
TEXTS: dict[str, tuple[Callable[[], Corpus], str, tuple[str, str, str], tuple[str, str, str]]] = {
    "math": (_sums, "####", ("gsm8k_train", *_GSM8K), ("gsm8k_test", *_GSM8K)),
    "law": (_licences, "", ("uscode_train", "{heading}\n", "{text}"), ("uscode_test", "{heading}\n", "{text}")),
    "code": (_modules, "", ("mbpp", '"""{text}"""\n', "{code}"), ("humaneval", "{prompt}", "{canonical_solution}")),
}

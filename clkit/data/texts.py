"""Texts as tokens: Math, Law and Code, embedded or real, and anyone's files; bytes, or the tokens of a tokenizer.

A text dataset has windows of tokens x (N, L) and the next token of each as target y (N, L). A window begins where a
document begins, or goes on with the one that did not fit the window before it; documents that fit share a window, and
none that would fit is cut. What is left of a window has no target (-100). Every document ends in a newline.
Documents are parted into training and test ones as a whole, so that no window of one part overlaps any of the other.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clkit import checks
from clkit.data.core import IGNORED, Dataset, Examples
from clkit.data.corpora import TEXTS, Part, Problem, hold_out, rows_of

BYTES = tuple(chr(i) if 32 < i < 127 else f"0x{i:02x}" for i in range(256))  # the names of the byte classes


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


def texts(
    name: str,
    *,
    path: str | Path | None = None,
    context: int = 64,
    limit: int | None = None,
    test_limit: int | None = 256,
    tokenizer: str | Path | None = None,
) -> Text:
    """Give "math", "law" or "code" as windows of `context` tokens: embedded stand-ins, or real texts below `path`.

    Embedded, without `path` and without any download:
    - math: all sums of two numbers from 10 to 99 with their steps, as in "47+38:7+8=15,4+3+1=8#85"; those of 256 pairs
      are held out, in both orders, and are the problems; the same on every machine
    - law: the licences of Python and of the installed packages, each paragraph once; they differ with the packages
    - code: modules of the standard library, up to 1 MB; they differ with the version of Python

    Real, from JSON lines anywhere in a folder or a zip:
    - math: GSM8K, gsm8k_train.jsonl and gsm8k_test.jsonl: question, newline, answer without its calculator notes
      (<<...>>); the problems ask for the number behind "####"
    - law: uscode_train.jsonl and uscode_test.jsonl: heading, newline, text
    - code: MBPP to train on, mbpp.jsonl: the task as a docstring, newline, code; HumanEval to test on,
      humaneval.jsonl: prompt and canonical solution

    `limit` and `test_limit` keep so many windows of a part, the first ones. `tokenizer` is a folder with a fast
    tokenizer of transformers; None takes bytes, 256 classes. The stream of all three is `domains({"math":
    texts("math"), "law": texts("law"), "code": texts("code")})`.

    Raises ValueError for an unknown name, a path without the files, and where a machine has too little to embed.
    """
    embedded, real = TEXTS[checks.choice("name", name, TEXTS)]
    part = embedded() if path is None else real(Path(path))
    return _dataset(name, part, context, limit, test_limit, tokenizer)


def text_file(
    path: str | Path,
    test: str | Path | None = None,
    *,
    fields: Sequence[str] = ("text",),
    context: int = 64,
    limit: int | None = None,
    test_limit: int | None = 256,
    tokenizer: str | Path | None = None,
) -> Text:
    """Read anyone's UTF-8 text: a .jsonl file, a document a row, or any other, documents between blank lines.

    A row's `fields` make its text, joined by newlines. `test` is a file to test on; without it a tenth of the
    documents is held out, at least one, chosen by their contents. The other arguments are those of `texts`.

    Raises ValueError for missing files and fields, and for fewer than two documents.
    """
    train = _documents(Path(path), fields)
    part = hold_out(train, str(path)) if test is None else Part(train, _documents(Path(test), fields))
    return _dataset(Path(path).stem, part, context, limit, test_limit, tokenizer)


def local_only(argument: str, path: str | Path) -> Any:
    """The transformers package, after a look whether `path` is a folder; raises in words where either is missing."""
    transformers = checks.package("transformers", "huggingface", f"{argument}={str(path)!r}")
    if not Path(path).is_dir():
        raise ValueError(f"{argument}={str(path)!r} is no folder: give one of save_pretrained; nothing is downloaded")
    return transformers


def _dataset(
    name: str,
    part: Part,
    context: int,
    limit: int | None,
    test_limit: int | None,
    tokenizer: str | Path | None,
) -> Text:
    for argument, value in (("context", context), ("limit", limit), ("test_limit", test_limit)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{argument}={value!r}: pass a whole number from 1 on")
    tokenizer = None if tokenizer is None else str(tokenizer)
    encode = _encoder(tokenizer)
    train, _ = _windows(part.train, encode, context, limit)
    test, width = _windows(part.test, encode, context, test_limit)
    classes = BYTES if tokenizer is None else _names(tokenizer)
    return Text(name, train, test, classes, bytes_per_token=width, problems=part.problems, tokenizer=tokenizer)


def _windows(
    documents: Iterable[str], encode: Callable[[str], tuple[np.ndarray, np.ndarray]], context: int, limit: int | None
) -> tuple[Examples, float]:
    """Cut documents into windows; also the mean number of bytes that a target stands for."""
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
    transformers = local_only("tokenizer", path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer={path!r} has no tokenizer ({error}): save one there") from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer={path!r} is slow and cannot place its tokens in a text: use a fast one")
    return tokenizer


def _names(path: str) -> tuple[str, ...]:
    tokenizer = _tokenizer(path)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return tuple(f"<{i}>" if name is None else name for i, name in enumerate(names))


def _documents(path: Path, fields: Sequence[str]) -> tuple[str, ...]:
    if not path.is_file():
        raise ValueError(f"path={str(path)!r} is no file: give a text or a .jsonl file")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return tuple(filter(None, (document.strip("\n") for document in re.split(r"\n\s*\n", text))))
    return tuple("\n".join(str(_field(row, field, path)) for field in fields) for row in rows_of(text))


def _field(row: dict[str, Any], field: str, path: Path) -> Any:
    if field not in row:
        raise ValueError(f"fields: {path} has no {field!r}; its rows have {', '.join(row)}")
    return row[field]

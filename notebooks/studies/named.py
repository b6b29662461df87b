"""Streams by name, as the papers' experiments use them."""

from collections.abc import Callable
from functools import cache, partial

from clkit import data
from clkit.data import Dataset, Stream

TASKS = {"digits": 5, "mnist": 5, "cifar10": 5, "cifar100": 10, "tiny-imagenet": 20}


def stream(name: str, tasks: int | None = None, *, limit: int | None = None) -> dict[str, Callable[[int], Stream]]:
    """A stream by its name in words: from the seed, which orders the classes (digits and letters keep theirs).

    Names: digits, letters (20 rendered capitals), and those of `data.load`; `limit` is a number of images a class.
    """
    count = tasks or TASKS.get(name, 5)
    words = f"{name}, {count} tasks" + (f", {limit} images a class" if limit else "")
    return {words: partial(_stream, name=name, tasks=count, limit=limit)}


def _stream(seed: int, name: str, tasks: int, limit: int | None) -> Stream:
    return data.split(dataset(name, limit), tasks, order=None if name in ("digits", "letters") else seed)


@cache
def dataset(name: str, limit: int | None = None) -> Dataset:
    """A dataset by one of these names, read once in a process."""
    if name == "digits":
        return data.digits()
    if name == "letters":
        return data.glyphs(characters="ABCDEFGHIJKLMNOPQRST", per_class=60, size=14)
    return data.load(name, limit=limit)

"""Streams by name, as the papers' experiments use them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch

from clkit import data
from clkit.data import Dataset, Examples, Normalize, Stream

TASKS = {"digits": 5, "mnist": 5, "cifar10": 5, "cifar100": 10, "tiny-imagenet": 20}


def stream(name: str, tasks: int | None = None, *, limit: int | None = None) -> dict[str, Callable[[int], Stream]]:
    """A stream by its name in words: from the seed, which orders the classes and draws the images.

    Names: digits, letters (20 rendered capitals), and those of `data.load`; `limit` is a number of training images a
    class. Of digits the seed draws the test quarter, of letters how they are rendered, of others which images it takes.
    """
    count = tasks or TASKS.get(name, 5)
    words = f"{name}, {count} tasks" + (f", {limit} images a class" if limit else "")
    return {words: partial(_stream, name=name, tasks=count, limit=limit)}


def _stream(seed: int, name: str, tasks: int, limit: int | None) -> Stream:
    return data.split(drawn(name, seed, limit), tasks, order=seed)


def drawn(name: str, seed: int, limit: int | None = None) -> Dataset:
    """A dataset by name with the images that the seed draws, all test images but of digits."""
    if name == "letters":
        return data.glyphs(characters="ABCDEFGHIJKLMNOPQRST", per_class=60, size=14, seed=seed)
    known, generator = dataset(name), torch.Generator().manual_seed(seed)
    if name == "digits":
        x, y = (torch.cat([getattr(part, field) for part in (known.train, known.test)]) for field in "xy")
        rows = torch.randperm(len(x), generator=generator)
        test, train = (Examples(x[part], y[part]) for part in rows.tensor_split([len(x) // 4]))
        return Dataset(name, train, test, known.classes, Normalize.of(train.x))
    if limit is None:
        return known
    rows = torch.randperm(len(known.train.y), generator=generator)
    y = known.train.y[rows]
    taken = torch.cat([rows[(y == label).nonzero()[:limit, 0]] for label in range(len(known.classes))])
    return replace(known, train=Examples(known.train.x[taken], known.train.y[taken]))


@cache
def dataset(name: str, limit: int | None = None) -> Dataset:
    """A dataset by one of these names, read once in a process."""
    return data.digits() if name == "digits" else data.load(name, limit=limit)

"""The tasks of AWM's experiments: scripts of glyphs, long sequences of characters, and real image sets."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from clkit import data
from clkit.data import Augment, Dataset, Examples, Normalize, Stream
from clkit.data.core import changed
from clkit.data.streams import Disjoint
from studies.awm.backbones import latin

SCRIPTS = ("greek", "cyrillic", "armenian", "georgian", "arrows", "math")
PAPER = ("stanford_cars", "cub200", "flowers102", "food101", "sketches", "wikiart")
CLASSES, TRAINED, TESTED, SIZE = 20, 24, 12, 28
IMAGENET = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@cache
def script(name: str, part: str = "test") -> Dataset:
    """Twenty evenly spaced characters of a script: per class 24 examples to train on, 12 to test on, 28 x 28 pixels.

    `part` "test" has the test examples; "held out" has as many others in their place, to choose settings by.
    """
    if part not in ("test", "held out"):
        raise ValueError(f"part: {part!r} is unknown; choose 'test' or 'held out'")
    known = data.glyphs(name, per_class=1, size=SIZE).classes
    rows = torch.linspace(0, len(known) - 1, CLASSES).long()
    full = data.glyphs(characters="".join(known[i] for i in rows), per_class=4 * TESTED, size=SIZE)
    number = torch.arange(len(full.train)) % (4 * TESTED)
    train, held_out = full.train[number < TRAINED], full.train[(number >= TRAINED) & (number < TRAINED + TESTED)]
    return replace(full, name=name, train=train, test=full.test if part == "test" else held_out)


def scripts(names: Sequence[str] = SCRIPTS, part: str = "test", scenario: Disjoint = "task") -> Stream:
    """Scripts as tasks, prepared as the Latin glyphs that the backbones know; by default the script is given."""
    return data.series({name: script(name, part) for name in names}, scenario=scenario, normalize=_latin())


def characters(tasks: int = 40) -> Stream:
    """Characters of all scripts but Latin, look-alikes left out, in tasks of equal size; prepared as for `scripts`."""
    full = data.glyphs([*SCRIPTS, "digits"], per_class=TRAINED, size=SIZE)
    return data.split(replace(full, normalize=_latin()), tasks, scenario="task")


def pictures(names: Sequence[str] = PAPER, *, size: int = 224, limit: int | None = None) -> Stream:
    """Real image sets as tasks, in colour, `size` pixels square, normalised as ImageNet is.

    Names are those of `data.load`, and `limit` is a number of images a class. Training images are cropped and mirrored
    at random, but for digits. The paper does not tell its preprocessing: torchvision's sets are cut to their central
    square where Piggyback cuts out of 256 pixels.
    """
    return data.series({name: _pictures(name, size, limit) for name in names}, normalize=IMAGENET)


def _pictures(name: str, size: int, limit: int | None) -> Dataset:
    digits = name.startswith(("mnist", "usps"))
    augment = Augment(crop=size // 8, flip=not digits)
    full = data.load(name, size=size, limit=limit, augment=augment)
    return changed(full, lambda part: Examples(part.x.expand(-1, 3, -1, -1), part.y))  # in colour


def _latin() -> Normalize:
    return latin()[0].normalize

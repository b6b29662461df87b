"""Ready-made datasets: the embedded digits, and torchvision's sets by name."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from clkit import checks, store
from clkit.data.augment import NO_AUGMENT, Augment, Normalize
from clkit.data.core import Dataset, Examples
from clkit.data.images import decode, held_out, resize, stored


@lru_cache(maxsize=1)
def digits() -> Dataset:
    """Give scikit-learn's 1,797 handwritten digits, 8x8, as bytes; a fixed quarter of each class is the test set."""
    from sklearn.datasets import load_digits

    names = tuple("0123456789")
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    every = Examples(x, torch.from_numpy(labels).long())
    train, test = (every[rows] for rows in held_out(every.y, names))
    return Dataset("digits", train, test, names, Normalize.of(train.x))


class _Source(NamedTuple):
    """A torchvision dataset: its class, the arguments of the training and test parts, and how it is augmented."""

    kind: str
    train: tuple[dict[str, Any], ...]
    test: tuple[dict[str, Any], ...]  # none: a quarter is held out
    augment: Augment = NO_AUGMENT
    large: bool = False  # image files of any size, to be resized


FLIP = Augment(flip=True)


def _flag(kind: str, augment: Augment = NO_AUGMENT, **extra: Any) -> _Source:
    return _Source(kind, ({"train": True, **extra},), ({"train": False, **extra},), augment)


def _parts(kind: str, train: Sequence[str], test: str, augment: Augment = FLIP, large=True) -> _Source:
    return _Source(kind, tuple({"split": part} for part in train), ({"split": test},), augment, large)


TORCHVISION = {
    "mnist": _flag("MNIST"),
    "fashion_mnist": _flag("FashionMNIST"),
    "kmnist": _flag("KMNIST"),
    "emnist": _flag("EMNIST", split="balanced"),
    "usps": _flag("USPS"),
    "cifar10": _flag("CIFAR10", Augment(crop=4, flip=True)),
    "cifar100": _flag("CIFAR100", Augment(crop=4, flip=True)),
    "svhn": _parts("SVHN", ["train"], "test", Augment(crop=4), large=False),
    "stl10": _parts("STL10", ["train"], "test", Augment(crop=12, flip=True), large=False),
    "gtsrb": _parts("GTSRB", ["train"], "test", NO_AUGMENT),
    "dtd": _parts("DTD", ["train", "val"], "test"),
    "eurosat": _Source("EuroSAT", ({},), (), FLIP, True),
    "fgvc_aircraft": _parts("FGVCAircraft", ["trainval"], "test"),
    "flowers102": _parts("Flowers102", ["train", "val"], "test"),
    "food101": _parts("Food101", ["train"], "test"),
    "oxford_iiit_pet": _parts("OxfordIIITPet", ["trainval"], "test"),
    "stanford_cars": _parts("StanfordCars", ["train"], "test"),
    "country211": _parts("Country211", ["train", "valid"], "test"),
}


def load(name: str, root: str | Path | None = None, *, size: int | None = None, download: bool = True) -> Dataset:
    """Load one of torchvision's sets by name (see `TORCHVISION`) as bytes (N, C, H, W).

    Files lie under `root` (default: torchvision/ in $CLKIT_CACHE or ~/.cache/clkit) and are downloaded if missing,
    unless `download` is False. `size` scales images to squares; sets of large images are always scaled, by default to
    64, and cut to squares. Their decoded tensors are kept beside the files if decoding took 20 s. Training and test
    parts are torchvision's, with a validation part counted as training; EuroSAT has one part, of which a quarter of
    each class is held out. EMNIST is the balanced split, upright. Augmentation is what is usual for the set.

    Raises ValueError for an unknown name, with close matches, and where files are missing.
    """
    checks.choice("name", name, TORCHVISION)
    if size is not None and size < 1:
        raise ValueError(f"size={size}: pass a number of pixels, or None")
    source = TORCHVISION[name]
    folder = Path(root).expanduser() if root is not None else store.cache_root() / "torchvision"
    size = size or (64 if source.large else None)
    train = [_open(source.kind, folder, arguments, download) for arguments in source.train]
    test = [_open(source.kind, folder, arguments, download) for arguments in source.test]
    parts = [_examples(part, (name, folder.resolve(), i), source.large, size) for i, part in enumerate(train + test)]
    classes = _classes(train[0], parts)
    learned = _joined(parts[: len(train)])
    if test:
        tested = _joined(parts[len(train) :])
    else:
        learned, tested = (learned[rows] for rows in held_out(learned.y, classes))
    augment = replace(source.augment, crop=size // 8) if source.large and size else source.augment
    return Dataset(name, learned, tested, classes, Normalize.of(learned.x), augment)


def _open(kind: str, root: Path, arguments: dict[str, Any], download: bool) -> Any:
    """Open a torchvision dataset, downloading it only where it is missing."""
    from torchvision import datasets

    root.mkdir(parents=True, exist_ok=True)
    make = getattr(datasets, kind)
    try:
        return make(root, download=False, **arguments)
    except (RuntimeError, FileNotFoundError) as error:
        if not download:
            raise ValueError(f"{kind} is not under root={str(root)!r} ({error}): pass download=True") from error
    return make(root, download=True, **arguments)


def _examples(dataset: Any, key: tuple[object, ...], large: bool, size: int | None) -> Examples:
    """Convert a torchvision dataset: decode its image files, or reshape the array that it holds."""
    if large:
        labels = torch.empty(len(dataset), dtype=torch.int64)

        def read(index: int) -> Image.Image:
            image, labels[index] = dataset[index]
            return image

        def make() -> dict[str, Tensor]:
            where = f"{type(dataset).__name__} image"
            threads = os.cpu_count() or 1
            x = decode(len(dataset), read, lambda i: f"{where} {i}", size=size, grey=False, threads=threads)
            return {"x": x, "y": labels}

        found = stored((*key, len(dataset), size), make)
        return Examples(found["x"], found["y"])
    x = torch.as_tensor(dataset.data)
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2) if x.shape[-1] == 3 else x
    x = x.mT if type(dataset).__name__ == "EMNIST" else x  # stored lying on their side
    y = torch.as_tensor(dataset.targets if hasattr(dataset, "targets") else dataset.labels).long()
    return Examples(resize(x, size) if size else x.contiguous(), y)


def _classes(dataset: Any, parts: list[Examples]) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None) or range(max(int(part.y.max()) for part in parts) + 1)
    return tuple(map(str, names))


def _joined(parts: list[Examples]) -> Examples:
    return Examples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))

"""Anyone's images: one folder per class, in a directory or a zip."""

import os
import re
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile, is_zipfile

import torch
from PIL import Image
from torch import Tensor

from clkit import checks
from clkit.data.augment import NO_AUGMENT, Augment, Normalize
from clkit.data.core import Dataset, Examples
from clkit.data.images import decode, held_out, stored

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
TRAIN, TEST = "train", ("test", "val", "valid", "validation")  # of the names of a test part, the first that is there
THREADS_PAY = 20_000  # bytes per image from which threads gain; below, they wait for the interpreter
LAYOUTS = "CLASS/image, train/CLASS/image with test/CLASS/image, or either in folders of domains"


def folder(
    path: str | Path,
    *,
    domain: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    grey: bool | None = None,
    augment: Augment = NO_AUGMENT,
    seed: int = 0,
) -> Dataset:
    """Read class-per-folder images from a directory or a zip as bytes (N, C, H, W).

    Layouts: train/CLASS/image and test/CLASS/image (val where there is no test), or CLASS/image, of which a quarter of
    each class is held out for testing, by `seed`. Either may lie in folders of domains, one of which `domain` names
    (see `folders`). Classes are numbered in alphabetical order and images in natural order (2 before 10, in both).
    `limit` keeps the first images of each class, so many in the training part and in the test part. `size` scales and
    cuts images to squares, `grey` makes one channel or three (default: three unless all are grey). What took 20 s to
    decode is kept under $CLKIT_CACHE (default ~/.cache/clkit) and read from there next time.

    Raises ValueError for a missing path, no images, another layout, fewer than two classes, unreadable images, and
    mixed sizes without `size`.
    """
    files = _survey(Path(path))
    names = sorted({file.domain for file in files if file.domain is not None}, key=_natural)
    if domain is None and names:
        raise ValueError(f"{path} has domains: pass domain= one of {', '.join(names)}, or use folders()")
    if domain is not None and not names:
        raise ValueError(f"domain: {domain!r}, but {path} has no domains; omit it")
    if domain is not None:
        checks.choice("domain", domain, names)
    return _read(Path(path), files, domain, size, limit, grey, augment, seed)


def folders(
    path: str | Path,
    *,
    size: int | None = None,
    limit: int | None = None,
    grey: bool | None = None,
    augment: Augment = NO_AUGMENT,
    seed: int = 0,
) -> dict[str, Dataset]:
    """Read a directory or zip of domains, DOMAIN/CLASS/image or DOMAIN/train/CLASS/image, as one dataset each.

    The arguments are those of `folder`; `domains(folders(path))` is the stream.
    """
    files = _survey(Path(path))
    names = sorted({file.domain for file in files if file.domain is not None}, key=_natural)
    if not names:
        raise ValueError(f"{path} has no folders of domains: use folder()")
    return {name: _read(Path(path), files, name, size, limit, grey, augment, seed) for name in names}


class _File(NamedTuple):
    """An image: its path inside the directory or zip, and what its folders say."""

    inside: str
    domain: str | None
    part: str | None
    label: str
    size: int  # bytes
    stamp: float  # changes with the content: a checksum in a zip, else the time of the last change


def _survey(path: Path) -> list[_File]:
    """Find the images, in natural order, and read the layout off the depth of the folders."""
    found = _listing(path)
    files = {tuple(inside.split("/")): (inside, *stamp) for inside, stamp in found.items()}
    hidden = (".", "__MACOSX")
    files = {
        parts: file
        for parts, file in files.items()
        if parts[-1].lower().endswith(SUFFIXES) and not any(part.startswith(hidden) for part in parts)
    }
    if not files:
        raise ValueError(f"path={str(path)!r} has no images: expected {LAYOUTS}")
    tops = {parts[0] for parts in files}
    while len(tops) == 1 and min(map(len, files)) > 2 and not tops & {TRAIN, *TEST}:
        files = {parts[1:]: file for parts, file in files.items()}  # a folder around it all, as many zips have
        tops = {parts[0] for parts in files}
    depth = len(next(iter(files)))
    for parts, (inside, *_) in files.items():
        if len(parts) != depth or not 2 <= depth <= 4:
            raise ValueError(f"path={str(path)!r}: the folders around {inside!r} do not fit; expected {LAYOUTS}")
    parted = depth == 4 or TRAIN in tops
    rows = []
    for parts in sorted(files, key=lambda parts: [_natural(part) for part in parts]):
        inside, size, stamp = files[parts]
        domain = parts[0] if depth == 4 or (depth == 3 and not parted) else None
        rows.append(_File(inside, domain, parts[-3] if parted else None, parts[-2], size, stamp))
    return rows


def _listing(path: Path) -> dict[str, tuple[int, float]]:
    """All files below a directory or in a zip: their size, and a number that changes with the content."""
    if path.is_dir():
        found = {}
        for root, _, names in os.walk(path, followlinks=True):
            for name in names:
                file = Path(root, name)
                status = file.stat()
                found[file.relative_to(path).as_posix()] = (status.st_size, status.st_mtime)
        return found
    if path.exists() and is_zipfile(path):
        with ZipFile(path) as archive:
            return {info.filename: (info.file_size, float(info.CRC)) for info in archive.infolist()}
    what = "is neither a directory nor a zip" if path.exists() else "does not exist"
    raise ValueError(f"path={str(path)!r} {what}: pass a directory or a zip of images")


def _natural(text: str) -> list[tuple[int, str]]:
    """Build a sorting key that compares runs of digits as numbers."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split("([0-9]+)", text)]


def _read(
    path: Path,
    files: list[_File],
    domain: str | None,
    size: int | None,
    limit: int | None,
    grey: bool | None,
    augment: Augment,
    seed: int,
) -> Dataset:
    if (size is not None and size < 1) or (limit is not None and limit < 1):
        raise ValueError(f"size={size}, limit={limit}: pass positive numbers, or None")
    files = [file for file in files if file.domain == domain]
    name = path.stem if domain is None else f"{path.stem}-{domain}"
    train, test = _parts(name, files, seed)
    classes = sorted({file.label for file in train}, key=_natural)
    other = {file.label for file in test} ^ set(classes)
    if other:
        raise ValueError(f"{name}: classes {sorted(other)[:5]} are in one part only: give each to train and test")
    if len(classes) < 2:
        raise ValueError(f"{name} has one class, {classes}: expected two or more in {LAYOUTS}")
    train, test = _limited(train, limit), _limited(test, limit)
    chosen = train + test
    x = stored((path.resolve(), chosen, size, grey), lambda: {"x": _decode(path, chosen, size, grey)})["x"]
    y = torch.tensor([classes.index(file.label) for file in chosen])
    every, cut = Examples(x, y), len(train)
    return Dataset(name, every[:cut], every[cut:], tuple(classes), Normalize.of(x[:cut]), augment)


def _parts(name: str, files: list[_File], seed: int) -> tuple[list[_File], list[_File]]:
    """Part files into those to train and to test on: by their folders, else by holding out a quarter."""
    parts = {file.part for file in files}
    train = [file for file in files if file.part in (None, TRAIN)]
    held = next((part for part in TEST if part in parts), None)
    if not train:
        raise ValueError(f"{name} has no images in a folder {TRAIN!r}, only in {sorted(map(str, parts))}")
    if held is not None:
        return train, [file for file in files if file.part == held]
    labels = sorted({file.label for file in train})
    rows = held_out(torch.tensor([labels.index(file.label) for file in train]), labels, seed)
    return [train[i] for i in rows[0].tolist()], [train[i] for i in rows[1].tolist()]


def _limited(files: list[_File], limit: int | None) -> list[_File]:
    """Keep the first `limit` files of each class."""
    if limit is None:
        return files
    by_class: dict[str, list[_File]] = {}
    for file in files:
        by_class.setdefault(file.label, []).append(file)
    return [file for group in by_class.values() for file in group[:limit]]


def _decode(path: Path, files: list[_File], size: int | None, grey: bool | None) -> Tensor:
    large = sum(file.size for file in files) > THREADS_PAY * len(files)
    with nullcontext() if path.is_dir() else ZipFile(path) as archive:

        def read(index: int) -> Image.Image:
            inside = files[index].inside
            return Image.open(BytesIO(archive.read(inside)) if archive else path / inside)

        def describe(index: int) -> str:
            return str(path / files[index].inside)

        threads = (os.cpu_count() or 1) if large else 1
        return decode(len(files), read, describe, size=size, grey=grey, threads=threads)

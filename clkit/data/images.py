"""Image sets as bytes (N, C, H, W): embedded digits, anyone's class-per-folder images, and real sets by name."""

import errno
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache, partial
from io import BytesIO
from itertools import takewhile
from operator import contains
from pathlib import Path
from statistics import multimode
from time import perf_counter
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from unicodedata import normalize
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from clkit import checks, store
from clkit.data.augment import NO_AUGMENT, Augment, Normalize
from clkit.data.core import Dataset, Examples

T = TypeVar("T")
FILES = 20_000_000  # that a folder or a zip may have; ImageNet-21k has 14 million
PIXELS = 2**30 // 12  # that an image may have, of the size of which Pillow warns: 9459 x 9459
Side = Annotated[int, checks.Range(1, math.isqrt(PIXELS))]
SMALL, RATIO = 2**30, 200  # a zip or a folder of images may unpack to SMALL bytes, and to RATIO times its own size more
ENDING = 2**16 + 21  # bytes at the end of a zip in which the record lies that counts its entries
SLOW = 20.0  # seconds of decoding that are worth a file
THREADS_PAY = 20_000  # bytes per image from which threads gain; below, they wait for the interpreter
SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".gif", ".webp", ".avif", ".heic", ".heif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".tga",
)  # fmt: skip
PARTS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "val": "val", "valid": "val",
    "validation": "val", "eval": "val", "evaluation": "val", "dev": "dev", "train_set": "train", "trainset": "train",
    "training_set": "train", "test_set": "test", "testset": "test", "testing_set": "test",
}  # fmt: skip
LAYOUTS = "CLASS/image, train/CLASS/image or CLASS/train/image with test for train, or these in folders of domains"
_DIRECT = {"1", "L", "LA", "La", "RGB", "RGBA", "RGBa", "P", "PA", "CMYK", "YCbCr"}  # modes of 8 bits
Ground = Literal["white", "grey", "black"]
FLIP, CROP_FLIP = Augment(flip=True), Augment(crop=4, flip=True)


class _Source(NamedTuple):
    """One of torchvision's sets: its class, what it is called with for its parts, and how it is augmented.

    A part is a value of the class's argument `train`, if it is a bool, or else `split`. Where there is no test part,
    a quarter is held out. `large` sets are image files of any size, to be resized.
    """

    kind: str
    train: tuple[bool | str | None, ...] = (True,)
    test: tuple[bool | str, ...] = (False,)
    augment: Augment = NO_AUGMENT
    large: bool = False
    options: Mapping[str, Any] = {}


TORCHVISION = {
    "mnist": _Source("MNIST"),
    "fashion_mnist": _Source("FashionMNIST"),
    "kmnist": _Source("KMNIST"),
    "emnist": _Source("EMNIST", options={"split": "balanced"}),
    "usps": _Source("USPS"),
    "cifar10": _Source("CIFAR10", augment=CROP_FLIP),
    "cifar100": _Source("CIFAR100", augment=CROP_FLIP),
    "svhn": _Source("SVHN", ("train",), ("test",), Augment(crop=4)),
    "stl10": _Source("STL10", ("train",), ("test",), Augment(crop=12, flip=True)),
    "gtsrb": _Source("GTSRB", ("train",), ("test",), large=True),
    "dtd": _Source("DTD", ("train", "val"), ("test",), FLIP, large=True),
    "eurosat": _Source("EuroSAT", (None,), (), FLIP, large=True),
    "fgvc_aircraft": _Source("FGVCAircraft", ("trainval",), ("test",), FLIP, large=True),
    "flowers102": _Source("Flowers102", ("train", "val"), ("test",), FLIP, large=True),
    "food101": _Source("Food101", ("train",), ("test",), FLIP, large=True),
    "oxford_iiit_pet": _Source("OxfordIIITPet", ("trainval",), ("test",), FLIP, large=True),
    "stanford_cars": _Source("StanfordCars", ("train",), ("test",), FLIP, large=True),
    "country211": _Source("Country211", ("train", "valid"), ("test",), FLIP, large=True),
}


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


@checks.arguments
def load(
    name: str,
    root: str | Path | None = None,
    *,
    size: Side | None = None,
    limit: checks.Count | None = None,
    augment: Augment | None = None,
    download: bool = True,
) -> Dataset:
    """Load a real image set by name as bytes (N, C, H, W): a pack of $CLKIT_DATA, else one of `TORCHVISION`.

    A pack is name.zip or else a folder of that name in the folder that $CLKIT_DATA names, laid out as for `folder`;
    "pack/domain" is a domain of one. Where there is none, or `root` is given, the set comes through torchvision. Its
    files lie under `root` (default: torchvision/ in $CLKIT_CACHE or ~/.cache/clkit). Missing ones are downloaded,
    unless `download` is False.

    `size` scales images to squares. Sets of large images are always scaled, by default to 64, and cut to squares;
    tensors that took 20 s to decode are kept. `limit` keeps the first images of each class, so many in the training
    part and in the test part. The parts are the set's own, with torchvision's validation part counted as training.
    EuroSAT has one part, of which a quarter of each class is held out. EMNIST is the balanced split, upright.
    Augmentation is by default what is usual for the set, crops of 4 pixels and flips for packs of other names.

    Raises ValueError for an unknown name, with close matches, and where files are missing or not to be had. What a
    download that failed left behind is removed.
    """
    source = TORCHVISION.get(name, _Source("", augment=CROP_FLIP))
    size = size or (64 if source.large else None)
    usual = replace(source.augment, crop=size // 8) if source.large and size else source.augment
    augment = usual if augment is None else augment
    packs, (pack, _, domain) = os.environ.get("CLKIT_DATA", ""), name.partition("/")
    for place in (f"{pack}.zip", pack) if packs and root is None else ():
        if (path := store.expand(packs) / place).exists():
            return folder(path, domain=domain or None, size=size, limit=limit, augment=augment)
    if name not in TORCHVISION:
        raise checks.unknown("name", name, TORCHVISION, others=["a pack in $CLKIT_DATA"])
    root = store.expand(root) if root is not None else store.cache_root() / "torchvision"
    opened = [_open(source, root, part, download) for part in (*source.train, *source.test)]
    with _damage(source, root):
        parts = [_examples(part, (name, root.resolve(), i), source.large, size) for i, part in enumerate(opened)]
        names = getattr(opened[0], "classes", None) or range(max(int(part.y.max()) for part in parts) + 1)
        train, classes = Examples.cat(parts[: len(source.train)]), tuple(map(str, names))
    if source.test:
        test = Examples.cat(parts[len(source.train) :])
    else:
        train, test = (train[rows] for rows in held_out(train.y, classes))
    if limit is not None:
        train, test = (part[first_of_each(part.y, limit)] for part in (train, test))
    return Dataset(name, train, test, classes, Normalize.of(train.x), augment)


@checks.arguments
def folder(
    path: str | Path,
    *,
    domain: str | None = None,
    size: Side | None = None,
    limit: checks.Count | None = None,
    grey: bool | None = None,
    ground: Ground = "white",
    augment: Augment = NO_AUGMENT,
    seed: int = 0,
) -> Dataset:
    """Read class-per-folder images from a directory or a zip as bytes (N, C, H, W).

    Layouts: train/CLASS/image and test/CLASS/image, CLASS/train/image and CLASS/test/image, or CLASS/image. Either
    may lie in folders of domains, one of which `domain` names (see `folders`), and in a folder around it all.

    - Parts: the words of `PARTS`, in any case. A level of folders is that of the parts if every name on it is such a
      word; beside other names, "train" is a class like them. What is in doubt is refused by name. The test part is
      "test", else "val", else "dev"; the others beside it are left out. Where there is none, a quarter of each class
      is held out, by `seed`.
    - Classes are numbered in alphabetical order and images in natural order (2 before 10, in both). Names that Unicode
      writes in two ways are one. A and a are two classes, so each must be in both parts.
    - What is hidden, other files and other folders without images are ignored. A class or a part has images.
    - `limit` keeps the first images of each class, so many in the training part and in the test part. `size` scales
      and cuts images to squares, `grey` makes one channel or three (default: three unless all are grey).
    - Transparent images are laid on a `ground`, white as a page is, on which black strokes show. An image that does
      not show on it is refused.

    What took 20 s to decode is kept under $CLKIT_CACHE (default ~/.cache/clkit) and read from there next time.

    Nothing is unpacked but in memory, and what would fill it is refused: images of more than `PIXELS`, images without
    `size` and zips whose contents would take more than `SMALL` bytes and `RATIO` times the bytes that they have.

    Raises FileNotFoundError for a missing path. Raises ValueError for no images, another layout, an unknown domain,
    fewer than two classes, unreadable, animated and 16-bit images, and mixed sizes without `size`.
    """
    tree, path = files(path), store.expand(path)
    by_domain = _survey(path, tree)
    parts = by_domain[checks.choice("domain", domain and normalize("NFC", domain), by_domain)]
    name = path.stem if domain is None else f"{path.stem}-{domain}"
    if "train" not in parts:
        raise ValueError(f"path: {name} has no images in a folder 'train', only in {sorted(parts)}; add it")
    held = next((part for part in ("test", "val", "dev") if part in parts), "train")
    train, test = parts["train"], parts[held]
    classes = sorted({image.label for image in train}, key=_natural)
    if other := {image.label for image in test} ^ set(classes):
        lone = sorted(other)[:5]
        raise ValueError(f"path: {name} has classes {lone} in one part only; give each to both, spelled alike")
    if len(classes) < 2:
        raise ValueError(f"path: {name} has one class, {classes}; expected two or more in {LAYOUTS}")

    def labels(part: Sequence[_Image]) -> Tensor:
        return torch.tensor([classes.index(image.label) for image in part])

    if held == "train":
        train, test = ([train[i] for i in rows] for rows in held_out(labels(train), classes, seed))
    if limit is not None:
        train, test = ([part[i] for i in first_of_each(labels(part), limit)] for part in (train, test))
    chosen, cut = train + test, len(train)

    def read(image: _Image) -> Image.Image:
        return Image.open(BytesIO(image.file.read()))

    sources = {str(path / image.inside): partial(read, image) for image in chosen}
    total = sum(image.file.size for image in chosen)
    pays, most = total > THREADS_PAY * len(chosen), _most(total) if size is None else math.inf
    key = (path.resolve(), [(image.inside, *image.file[:2]) for image in chosen], size, grey, ground)
    x = _kept(key, lambda: decode(sources, size=size, grey=grey, ground=ground, threaded=pays, most=most))
    every = Examples(x, labels(chosen))
    return Dataset(name, every[:cut], every[cut:], tuple(classes), Normalize.of(x[:cut]), augment)


@checks.arguments
def folders(path: str | Path, **options: Any) -> dict[str, Dataset]:
    """Read a directory or zip of domains, DOMAIN/CLASS/image or DOMAIN/train/CLASS/image, as one dataset each.

    The options and errors are those of `folder`, and ValueError where there are no domains; `domains(folders(path))`
    is the stream.
    """
    tree = files(path)
    names = _survey(store.expand(path), tree)
    if None in names:
        raise ValueError(f"path: {str(path)!r} has no folders of domains; use folder()")
    return {name: folder(path, domain=name, **options) for name in names if name is not None}


class File(NamedTuple):
    """A file below a directory or in a zip: its bytes' number, a stamp that changes with them, and how to get them.

    The stamp is a checksum in a zip, else the time of the last change.
    """

    size: int = 0
    stamp: float = 0.0
    read: Callable[[], bytes] = bytes


def files(path: str | Path) -> dict[str, File]:
    """Find all files and folders below a directory or in a zip, by their paths inside, in the order of these.

    A folder is an empty file whose path ends in a slash. What is hidden is left out. Nothing is unpacked but in memory,
    when a file is read. Raises FileNotFoundError where there is no `path`. Raises ValueError where it is neither, where
    a folder or file cannot be looked at, and for more than `FILES` files.
    """
    remedy, found = "give a directory or zip that can be", {}
    if not (directory := os.path.isdir(place := store.expand(path))):  # noqa: PTH112  # Path's own raises for odd names
        store.regular(place, remedy=remedy).close()
    try:
        for inside, file in _below(place) if directory else _zipped(place):
            if len(found) == FILES:
                raise ValueError(f"it has more than {FILES:,} files")
            if inside in found and inside[-1:] not in ("", "/"):
                raise ValueError(f"it has {inside!r} twice")
            found[inside] = file
    except Exception as error:  # whatever zips raise
        place = str(getattr(error, "filename", None) or path)
        raise ValueError(f"path: {place!r} cannot be read ({error}); {remedy}") from error
    return dict(sorted(found.items()))


def regular_files(folder: Path) -> None:
    """Raise ValueError if a folder has pipes, devices or broken links below it, for which others would wait."""
    if odd := next((place for place in folder.rglob("*") if not (place.is_file() or place.is_dir())), None):
        raise ValueError(f"{odd} is no file")


def _below(folder: Path | str, inside: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, File]]:
    state = os.stat(folder)  # noqa: PTH116
    above = (*above, (state.st_dev, state.st_ino))
    if above.index(above[-1]) < len(above) - 1:
        raise OSError(errno.ELOOP, "a link leads back to a folder above it", str(folder))
    for entry in [entry for entry in os.scandir(folder) if _shown(entry.name)]:
        if entry.is_dir():
            yield f"{inside}{entry.name}/", File()
            yield from _below(entry.path, f"{inside}{entry.name}/", above)
        else:
            stat = entry.stat()
            yield f"{inside}{entry.name}", File(stat.st_size, stat.st_mtime, partial(store.content, entry.path))


def _zipped(path: Path) -> Iterator[tuple[str, File]]:
    archive = ZipFile(path)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - ENDING))
        said = int.from_bytes(file.read().rpartition(b"PK\5\6")[2][6:8], "little")
    if said not in (len(archive.infolist()), 2**16 - 1):  # one that reads too far would swallow those behind it
        raise ValueError(f"its directory says {said} entries and has {len(archive.infolist())}")
    total, most = sum(info.file_size for info in archive.infolist()), _most(path.stat().st_size)
    if total > most:
        raise ValueError(f"it unpacks to {total:,} bytes, the limit for a zip of its size is {most:,}")

    def read(info: ZipInfo) -> bytes:
        told = checks.explained(
            f"path: {info.filename!r} of {path} cannot be read", "pack it again, without a password"
        )
        with told, archive.open(info) as file:
            return file.read(info.file_size + 1)  # what unpacks to more than is said is cut, and has another checksum

    for info in archive.infolist():
        names = [name for name in info.filename.replace("\\", "/").split("/") if name not in ("", ".")]
        shown = list(takewhile(_shown, names))
        hidden = len(shown) < len(names)
        if not info.is_dir() and (hidden or not info.filename.lower().endswith(SUFFIXES)):
            archive.open(info).close()  # an image by a damaged name would pass for a file to leave out
        if info.is_dir() or hidden:
            yield "/".join([*shown, ""]), File()
        else:
            yield "/".join(shown), File(info.file_size, float(info.CRC), partial(read, info))


def _most(size: int) -> int:
    """The bytes to which so many may unpack."""
    return SMALL + RATIO * size


def _shown(name: str) -> bool:
    return not name.startswith((".", "__MACOSX"))


class _Image(NamedTuple):
    """An image: its path inside the directory or zip, its class, and its file."""

    inside: str
    label: str
    file: File


def _survey(path: Path, tree: Mapping[str, File]) -> dict[str | None, dict[str, list[_Image]]]:
    """Read the layout off the names of folders (see `folder`): the images of each part of each domain, in their order.

    Without folders of parts, all images are the part "train".
    """
    where, names = f"path: {str(path)!r}", {inside: (*normalize("NFC", inside).split("/"),) for inside in tree}
    found = {inside: parts[:-1] for inside, parts in names.items() if inside.lower().endswith(SUFFIXES)}
    if not found:
        raise ValueError(f"{where} has no images; expected {LAYOUTS}")
    depth = max(multimode(map(len, found.values())))
    odd = [inside for inside, parts in found.items() if len(parts) != depth]
    levels = [set(level) for level in zip(*found.values(), strict=False)]
    parted = [i for i, level in enumerate(levels) if all(name.lower() in PARTS for name in level)]
    others = [i for i in range(len(levels)) if i not in parted]
    while len(others) > 1 and len(levels[others[0]]) == 1:
        del others[0]  # a folder around it all, as many zips have
    if odd or len(parted) > 1 or len(others) not in (1, 2):
        raise ValueError(f"{where}; the folders around {[*odd, *found][0]!r} do not fit, expected {LAYOUTS}")
    for i in others if not parted else ():
        words = {name for name in levels[i] if name.lower() in PARTS}
        if words and (i != others[-1] or {PARTS[word.lower()] for word in words} > {"train"}):
            beside = sorted(levels[i] - words)[:5]
            raise ValueError(f"{where} has {sorted(words)} beside {beside}, parts or not; remove or rename either")
    full = {parts[:i] for parts in found.values() for i in range(depth + 1)}
    every = {parts[:i] for parts in names.values() for i in range(1, len(parts))}
    for *above, name in sorted(every - full):
        known = len(above) == others[-1] or (len(above) in parted and name.lower() in PARTS)
        if known and all(map(contains, levels, above)):
            raise ValueError(f"{where} has no images in {'/'.join([*above, name])!r}; add readable ones or remove it")
    images: dict[str | None, dict[str, list[_Image]]] = {}
    spelled: dict[tuple[str, ...], str] = {}
    order = {inside: [*(parts[i] for i in others), "/".join(names[inside])] for inside, parts in found.items()}
    for inside in sorted(found, key=lambda inside: [*map(_natural, order[inside])]):
        parts, part = found[inside], "train"
        for i in parted:
            part = PARTS[parts[i].lower()]
            if (other := spelled.setdefault((*parts[:i], part), parts[i])) != parts[i]:
                raise ValueError(f"{where} has {other!r} and {parts[i]!r} for its {part} part; join or rename them")
        domain = images.setdefault(parts[others[0]] if len(others) == 2 else None, {})
        domain.setdefault(part, []).append(_Image(inside, parts[others[-1]], tree[inside]))
    return images


def _natural(text: str) -> tuple[list[tuple[int, str]], str]:
    """Build a sorting key that compares runs of digits as numbers, and texts that are equal so as they are written."""
    parts = ((piece.lstrip("0"), piece) for piece in re.split("([0-9]+)", text))
    return [(len(short), short) if piece.isdecimal() else (-1, piece) for short, piece in parts], text


def decode(
    sources: Mapping[str, Callable[[], Image.Image]],
    *,
    size: int | None = None,
    grey: bool | None = None,
    ground: Ground = "white",
    threaded: bool = True,
    argument: str = "path",
    most: float = math.inf,
) -> Tensor:
    """Read images, by names that errors give them, into one uint8 tensor (N, 1 or 3, H, W).

    With `size`, each is scaled to fill a square of that side and cut to it around its centre. `grey` chooses one
    channel or three; None means three unless all images are grey. Transparent images are laid on the `ground`. Raises
    ValueError that begins with `argument` where an image cannot be read, does not show, or has more than `PIXELS`. It
    also raises it where sizes differ and `size` is None, and where all images would take more than `most` bytes.
    """

    def pixels(name: str) -> np.ndarray:
        told = checks.explained(f"{argument}: {name} cannot be read as an image", "mend or remove it")
        with told, sources[name]() as image:
            array = _pixels(image, size, grey, ground)
            if (total := len(sources) * array.nbytes) > most:
                raise ValueError(f"all {len(sources)} like it would take {total:,} bytes, the limit is {most:,}")
            return array

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # it starts no thread before it is given work
        arrays = list((pool.map if threaded else map)(pixels, sources))
    sizes = {f"{array.shape[1]}x{array.shape[0]}": name for name, array in zip(sources, arrays, strict=True)}
    if len(sizes) > 1:
        (one, first), (other, second), *_ = sizes.items()
        raise ValueError(f"size: None, but {first} is {one} and {second} {other}; pass a size to bring all images to")
    colour = any(array.ndim == 3 for array in arrays)
    out = torch.empty(len(arrays), 3 if colour else 1, *arrays[0].shape[:2], dtype=torch.uint8)
    for row, array in zip(out.numpy(), arrays, strict=True):
        row[:] = array.transpose(2, 0, 1) if array.ndim == 3 else array
    return out


def _pixels(image: Image.Image, size: int | None, grey: bool | None, ground: str) -> np.ndarray:
    if image.width * image.height > PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, the limit is {PIXELS:,}")
    if image.mode not in _DIRECT:
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel, or is no grey, RGB or CMYK")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # what phones add to a picture are previews
        raise ValueError("it has several frames; save the one that is meant")
    if size is not None:
        image.draft(None, (size, size))  # lets a JPEG decode at a fraction of its size
    mode = "L" if grey or (grey is None and image.mode in ("1", "L", "LA", "La")) else "RGB"
    image.load()  # what some formats say of an image, its orientation for one, is at their end
    if image.info:
        ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        seen = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
        if np.ptp(np.asarray(image.getchannel("A"))) and not np.ptp(np.asarray(seen), (0, 1)).any():
            raise ValueError(f"with its transparency it does not show on ground={ground!r}; pass another ground")
        image = seen
    if image.mode != mode:
        image = image.convert(mode)
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def held_out(y: Tensor, names: Sequence[str], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hold out a random quarter of each class of labels (N,): the rows to train on (n,), and to test on (N - n,).

    At least one example of a class is held out. Raises ValueError for a class of one.
    """
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique().tolist():
        rows = (y == label).nonzero().squeeze(1)
        if len(rows) < 2:
            raise ValueError(f"classes: {names[label]!r} has 1 example; give it at least 2, one of them to test on")
        test[rows[torch.randperm(len(rows), generator=generator)[: max(1, round(len(rows) / 4))]]] = True
    return (~test).nonzero().squeeze(1), test.nonzero().squeeze(1)


def first_of_each(y: Tensor, count: int, skip: int = 0) -> Tensor:
    """The rows (n,) of the first `count` examples of each class of labels (N,), after `skip` ones, in their order."""
    rows = [(y == label).nonzero().squeeze(1)[skip : skip + count] for label in y.unique()]
    return torch.cat(rows).sort().values


def _open(source: _Source, root: Path, part: bool | str | None, download: bool) -> Any:
    """Open a part of a torchvision set, downloading it only where it is missing."""
    from torchvision import datasets

    chosen = {"train": part} if isinstance(part, bool) else {"split": part} if part else {}
    make = partial(getattr(datasets, source.kind), root, **chosen, **source.options)
    remedy = f"copy {str(root)!r} from where it is, or give a pack to $CLKIT_DATA"
    with _damage(source, root):
        regular_files(root)
        try:
            return make(download=False)
        except (RuntimeError, FileNotFoundError):  # a part is missing
            pass
    if not download:
        raise ValueError(f"name: {source.kind} is not in {str(root)!r}; pass download=True, {remedy}")
    with store.Records(root).lock("download"):
        before = {*root.rglob("*")}
        try:
            return make(download=True)
        except BaseException as error:
            for place in sorted({*root.rglob("*")} - before, reverse=True):  # or the next process takes it for whole
                place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink()
            if not isinstance(error, Exception):
                raise
            where = f"name: {source.kind} cannot be downloaded to {str(root)!r}"
            raise ValueError(f"{where} ({error}); connect, {remedy}") from error


def _damage(source: _Source, root: Path) -> AbstractContextManager[None]:
    return checks.explained(f"name: {source.kind} in {str(root)!r} is damaged", "remove it to have it downloaded anew")


def _examples(dataset: Any, key: tuple[object, ...], large: bool, size: int | None) -> Examples:
    """Convert a torchvision dataset: decode its image files, or reshape the array that it holds."""
    if large:

        def make() -> dict[str, Tensor]:
            labels = torch.empty(len(dataset), dtype=torch.int64)

            def read(index: int) -> Image.Image:
                image, labels[index] = dataset[index]
                return image

            sources = {f"{type(dataset).__name__} image {i}": partial(read, i) for i in range(len(dataset))}
            return {"x": decode(sources, size=size, grey=False, argument="name"), "y": labels}

        return Examples(**_kept((*key, len(dataset), size), make))
    x = torch.as_tensor(dataset.data)
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2) if x.shape[-1] == 3 else x
    x = x.mT if type(dataset).__name__ == "EMNIST" else x  # stored lying on their side
    if size and x.shape[2:] != (size, size):
        x = interpolate(x, (size, size), mode="bilinear", antialias=True)
    y = torch.as_tensor(dataset.targets if hasattr(dataset, "targets") else dataset.labels).long()
    return Examples(x.contiguous(), y)


def _kept(key: object, make: Callable[[], T]) -> T:
    """Make tensors, or read those that an earlier process made for the same key; kept if making took 20 s or more."""
    path = store.cache_root() / "data" / f"{store.digest(repr(key))}.safetensors"
    found = store.intact(path, store.read_tree)
    if found is not None:
        return found
    start = perf_counter()
    tensors = make()
    if perf_counter() - start >= SLOW:
        store.attempt(lambda: store.write_tree(path, tensors))
    return tensors

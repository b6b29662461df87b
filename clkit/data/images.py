"""Image files to tensors: decoding, resizing, a held-out part for testing, and a store for what took long."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import perf_counter

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from clkit import store

SLOW = 20.0  # seconds of decoding that are worth a file
DIRECT = {"1", "L", "LA", "RGB", "RGBA", "P", "CMYK", "YCbCr"}  # modes of 8 bits


def decode(
    count: int,
    read: Callable[[int], Image.Image],
    describe: Callable[[int], str],
    *,
    size: int | None = None,
    grey: bool | None = None,
    threads: int = 1,
) -> Tensor:
    """Read `count` images into one uint8 tensor (count, 1 or 3, H, W).

    With `size`, each is scaled to fill a square of that side and cut to it around its centre. `grey` chooses one
    channel or three; None means three unless all images are grey. Raises ValueError with the `describe`d image where
    one cannot be read, or where sizes differ and `size` is None.
    """

    def pixels(index: int) -> np.ndarray:
        try:
            with read(index) as image:
                return _pixels(image, size, grey)
        except Exception as error:
            raise ValueError(f"{describe(index)} cannot be read as an image ({error}): mend or remove it") from error

    with ThreadPoolExecutor(threads) as pool:
        arrays = list(pool.map(pixels, range(count)) if threads > 1 else map(pixels, range(count)))
    shapes = [array.shape[:2] for array in arrays]
    other = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    if other is not None:
        raise ValueError(
            f"size=None, but {describe(0)} is {shapes[0][1]}x{shapes[0][0]} and {describe(other)} "
            f"{shapes[other][1]}x{shapes[other][0]}: pass a size to bring all images to"
        )
    colour = any(array.ndim == 3 for array in arrays)
    out = torch.empty(count, 3 if colour else 1, *shapes[0], dtype=torch.uint8)
    for row, array in zip(out.numpy(), arrays, strict=True):
        row[:] = array.transpose(2, 0, 1) if array.ndim == 3 else array
    return out


def _pixels(image: Image.Image, size: int | None, grey: bool | None) -> np.ndarray:
    if image.mode not in DIRECT:
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
    if size is not None:
        image.draft(None, (size, size))  # lets a JPEG decode at a fraction of its size
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    mode = "L" if grey or (grey is None and image.mode in ("1", "L", "LA")) else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def resize(x: Tensor, size: int) -> Tensor:
    """Scale uint8 images (N, C, H, W) to squares of side `size`, averaging where they shrink."""
    if x.shape[2:] == (size, size):
        return x
    return interpolate(x, (size, size), mode="bilinear", antialias=True)


def held_out(y: Tensor, names: Sequence[str], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hold out a random quarter of each class for testing, at least one example: the rows to train on, to test on."""
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique().tolist():
        rows = (y == label).nonzero().squeeze(1)
        if len(rows) < 2:
            raise ValueError(f"class {names[label]!r} has 1 example: give it at least 2, one of them to test on")
        test[rows[torch.randperm(len(rows), generator=generator)[: max(1, round(len(rows) / 4))]]] = True
    return (~test).nonzero().squeeze(1), test.nonzero().squeeze(1)


def stored(key: object, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Make tensors, or read those that an earlier process made for the same key; kept if making took 20 s or more."""
    path = store.cache_root() / "data" / f"{store.digest(repr(key))}.safetensors"
    found = store.whole(path, store.read_tree)
    if found is not None:
        return found
    start = perf_counter()
    tensors = make()
    if perf_counter() - start >= SLOW:
        with suppress(OSError):  # where nothing can be written, the next process decodes again
            store.write_tree(path, tensors)
    return tensors

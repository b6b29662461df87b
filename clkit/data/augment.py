"""From raw rows to a model's input: normalisation, and random crops, flips and shifts as one batched gather."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from clkit import checks

Pixels = Annotated[int, checks.Range(0, means="pixels")]
Moves = tuple[Tensor, Tensor, Tensor]  # crop offsets (2, N), whether to flip (N,), shift offsets (2, N)


@dataclass(frozen=True)
class Normalize:
    """Map raw inputs to floats: bytes to [0, 1], then (x - mean) / std per channel (axis 1); tokens pass through.

    One value serves any number of channels. Floating inputs keep their dtype unless another is asked for, and
    are not divided by 255. Complex inputs always keep theirs.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[checks.Positive, ...] = (1.0,)

    def __post_init__(self) -> None:
        checks.fields(self)
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean: {self.mean}, and std {self.std}; pass one of each for every channel")

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Normalise raw rows (N, C, ...) on their device, in a `dtype`; int64 tokens are returned as they are."""
        if x.dtype == torch.int64:
            return x
        if len(self.mean) not in (1, x.shape[1]):
            raise ValueError(f"{self} has {len(self.mean)} channels and the input {x.shape[1]}; pass one mean each")
        dtype = x.dtype if x.is_complex() else dtype or (x.dtype if x.is_floating_point() else torch.float32)
        scale, shift = _affine(self, x.dtype == torch.uint8, dtype, x.device)
        shape = (-1,) + (1,) * (x.ndim - 2)
        scaled = x * scale.view(shape) if x.dtype == dtype else x.to(dtype).mul_(scale.view(shape))
        return scaled.add_(shift.view(shape))

    @classmethod
    def of(cls, x: Tensor) -> "Normalize":
        """Measure the channels of raw inputs (N, C, ...), rounded to four digits; a constant channel gets std 1."""
        mean, std = [], []
        for channel in x.unbind(1):
            if x.dtype == torch.uint8:
                share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
                levels = torch.arange(256, device=x.device).double() / 255
                average = (share * levels).sum()
                spread = (share * (levels - average) ** 2).sum().sqrt()
            else:
                average, spread = channel.double().mean(), channel.double().std(correction=0)
            mean.append(round(average.item(), 4))
            std.append(round(spread.item(), 4) or 1.0)
        return cls(tuple(mean), tuple(std))


@lru_cache(maxsize=64)
def _affine(normalize: Normalize, byte: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift as tensors on a device, kept there: making them anew would wait for the device every step."""
    unit = 255 if byte else 1
    scale = [1 / (unit * std) for std in normalize.std]
    shift = [-mean / std for mean, std in zip(normalize.mean, normalize.std, strict=True)]
    with torch.inference_mode(False):  # what is kept must serve training too, wherever it was first asked for
        return torch.tensor(scale, dtype=dtype, device=device), torch.tensor(shift, dtype=dtype, device=device)


@dataclass(frozen=True)
class Augment:
    """Move and mirror images (N, C, H, W) at random, each its own way.

    `crop`: pad by so many zeros on all sides, then cut a window of the old size. `flip`: mirror left and right, half
    of the time. `shift`: move by up to so many pixels either way, repeating the pixels at the border (where zero is no
    background). They apply in this order.
    """

    crop: Pixels = 0
    flip: bool = False
    shift: Pixels = 0
    __post_init__ = checks.fields

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a change for each image and apply all of them in one gather on the images' device.

        With everything off, returns `x` and draws nothing. The numbers come from the generator, on its own device.
        """
        moves = self.drawn(x, generator)
        return x if moves is None else self.apply(x, *moves)

    def drawn(self, x: Tensor, generator: torch.Generator | None) -> Moves | None:
        """Draw a change for each image, on the images' device; None, and nothing drawn, where nothing is to change."""
        if generator is None or self == NO_AUGMENT:
            return None
        if x.ndim != 4:
            raise ValueError(f"{self} needs images (N, C, H, W), not shape {tuple(x.shape)}; use Augment()")
        crop, flip, shift = (draw.to(x.device, non_blocking=True) for draw in self.draw(len(x), generator))
        return crop, flip, shift

    def draw(self, count: int, generator: torch.Generator) -> Moves:
        """Draw, for each of `count` images: crop offsets (2, N), whether to flip (N,), shift offsets (2, N)."""

        def integers(limit: int, *shape: int) -> Tensor:
            return torch.randint(-limit, limit + 1, shape, generator=generator, device=generator.device)

        crop = integers(self.crop, 2, count)
        flip = torch.randint(int(self.flip) + 1, (count,), generator=generator, device=generator.device).bool()
        return crop, flip, integers(self.shift, 2, count)

    def apply(self, x: Tensor, crop: Tensor, flip: Tensor, shift: Tensor) -> Tensor:
        """Apply drawn changes to images, in one gather: each output pixel names the pixel it comes from."""
        height, width = x.shape[2:]
        row = torch.arange(height, device=x.device)
        column = torch.arange(width, device=x.device)
        rows = (row + shift[0, :, None]).clamp(0, height - 1)
        columns = (column + shift[1, :, None]).clamp(0, width - 1)
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
        rows, columns = rows + crop[0, :, None], columns + crop[1, :, None]
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
        moved = x.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)
        return moved * inside[:, None] if self.crop else moved


def check_images(owner: str, x: Tensor, normalize: Normalize) -> None:
    """Raise where raw images (N, C, H, W) have their channels last, or are bytes of another dtype than uint8."""
    channels, height, width = x.shape[1:]
    if width in (1, 3, 4) and channels not in (1, 3, 4) and height != width:
        shape = tuple(x.shape[1:])
        raise ValueError(f"{owner}: images {shape} have their channels last; pass x.permute(0, 3, 1, 2).contiguous()")
    whole = not x.is_floating_point() and not x.is_complex() and x.dtype not in (torch.uint8, torch.bool)
    alike = x.is_floating_point() and channels in (1, 3, 4) and max(normalize.std) <= 1
    if whole or (alike and x.min() >= 0 and 127 < x.max() < 256):
        raise ValueError(f"{owner}: images from {x.min()} to {x.max()} are {x.dtype}; pass bytes as x.to(torch.uint8)")


def as_tensor(name: str, values: Any) -> Tensor:
    """Rows as people have them, an array or nested lists of numbers, as a tensor; TypeError for anything else."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_meta:
            raise TypeError(f"{name}: it has the layout {values.layout} on {values.device}; pass x.to_dense()")
        return values.detach() if values.requires_grad else values
    try:
        array = np.asarray(values)
        return torch.from_numpy(np.array(array, np.int32 if array.dtype == np.uint16 else None))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: {values!r:.80} is no tensor or array of numbers ({error}); pass one") from error


def as_labels(y: Tensor) -> Tensor:
    """Whole numbers of any type as int64; TypeError for others."""
    whole = y if y.dtype == torch.int64 else y.long()
    if y.is_complex() or (whole is not y and not torch.equal(whole.to(y.dtype), y)):
        raise TypeError(f"y: it holds numbers that are not whole, {y.dtype}; labels count classes from 0")
    return whole


BYTES = Normalize()
NO_AUGMENT = Augment()

"""Glyphs: characters drawn from the fonts that matplotlib ships, hundreds of classes without a download."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from clkit import checks
from clkit.data.augment import Normalize
from clkit.data.core import Dataset, Examples


def _span(*ranges: tuple[int, int]) -> str:
    return "".join(chr(code) for first, last in ranges for code in range(first, last + 1))


SCRIPTS = {
    "latin": _span((0x41, 0x5A), (0x61, 0x7A)),
    "digits": _span((0x30, 0x39)),
    "greek": _span((0x391, 0x3A1), (0x3A3, 0x3A9), (0x3B1, 0x3C9)),
    "cyrillic": _span((0x410, 0x44F), (0x401, 0x401), (0x451, 0x451)),
    "armenian": _span((0x531, 0x556), (0x561, 0x587)),
    "georgian": _span((0x10D0, 0x10F0)),
    "arrows": _span((0x2190, 0x21FF)),
    "math": _span((0x2200, 0x22FF)),
}
FONTS = {
    "sans": "DejaVuSans", "sans-bold": "DejaVuSans-Bold",
    "sans-oblique": "DejaVuSans-Oblique", "sans-bold-oblique": "DejaVuSans-BoldOblique",
    "serif": "DejaVuSerif", "serif-bold": "DejaVuSerif-Bold",
    "serif-italic": "DejaVuSerif-Italic", "serif-bold-italic": "DejaVuSerif-BoldItalic",
    "mono": "DejaVuSansMono", "mono-bold": "DejaVuSansMono-Bold",
    "mono-oblique": "DejaVuSansMono-Oblique", "mono-bold-oblique": "DejaVuSansMono-BoldOblique",
}  # fmt: skip
EM = 0.85  # size of the font, in units of the image
TURN, GROW, MOVE = 12.0, 0.15, 0.07  # jitter 1: degrees, relative size, units of the image, each way
DETAIL = 2  # glyphs are drawn so many times larger than sampled, so that sampling averages
ALIKE, ALIKE_CASES = 0.07, 0.17  # distances below which two shapes are one; for the two cases of a letter


@checks.arguments
def glyphs(
    script: str | Sequence[str] = "latin",
    *,
    characters: str | None = None,
    fonts: str | Sequence[str] | None = None,
    per_class: checks.Count = 100,
    size: Annotated[int, checks.Range(8, means="pixels")] = 28,
    jitter: Annotated[float, checks.Range(0, 2)] = 1.0,
    seed: int = 0,
) -> Dataset:
    """Draw characters in DejaVu fonts with random size, rotation and position: grey images (size, size), uint8.

    `script` is one of `SCRIPTS`, several as a list or joined as in "latin+greek", or "all"; `characters` names
    characters instead. `fonts` is one or several of `FONTS`, by default all 12, which share the examples of a class
    evenly. A script's characters are those that all 12 have, whichever are used, so
    `domains({font: glyphs(fonts=font) for font in ("sans", "serif", "mono")})` has fonts as domains.

    Several scripts make a joint set, without a character that looks like an earlier one: A, Greek Alpha and Cyrillic A
    are one shape, and so are o and O. Two shapes are one if their renderings, cut to their bounds and stretched to
    one size, differ little on average over the fonts; the cases of a letter may differ a little more. A single script
    keeps all its characters, at their natural sizes.

    Each class has `per_class` training examples and a quarter as many test examples: the same characters and fonts,
    other draws of the jitter. `jitter` 1 means up to 12 degrees, 15 % in size and 7 % of the image in position either
    way; 0 means none. Equal arguments give equal data, drawn once in a process. Raises ValueError for unknown names,
    with close matches.
    """
    scripts = _named("script", SCRIPTS if script in ("all", ("all",)) else script, SCRIPTS)
    faces = _named("fonts", FONTS if fonts is None else fonts, FONTS)
    if characters is None:
        chosen, label = _script(scripts), "all" if scripts == tuple(SCRIPTS) else "+".join(scripts)
    else:
        chosen, label = characters, characters
        missing = sorted(set(characters) - _covered())
        if missing or not characters or len(set(characters)) < len(characters):
            raise ValueError(f"characters: {characters!r}; pass each once, and leave out {missing}, which a font lacks")
    label += f"/{'+'.join(faces)}" if fonts is not None else ""
    return _draw(f"glyphs-{label}", chosen, faces, per_class, size, jitter, seed)


def _named(argument: str, names: str | Iterable[str], known: Mapping[str, str]) -> tuple[str, ...]:
    """The names in an argument, a text with "+" between them or several texts, each once."""
    found = tuple(dict.fromkeys(names.split("+") if isinstance(names, str) else names))
    if not found:
        raise ValueError(f"{argument}: {names!r}; name at least one")
    return tuple(checks.choice(argument, name, known) for name in found)


@lru_cache(maxsize=16)
def _draw(
    name: str, characters: str, faces: tuple[str, ...], per_class: int, size: int, jitter: float, seed: int
) -> Dataset:
    plates = torch.stack([_plates(face, characters, DETAIL * size) for face in faces], 1)
    generator = torch.Generator().manual_seed(seed)
    train = _jittered(plates, per_class, size, jitter, generator)
    test = _jittered(plates, max(1, per_class // 4), size, jitter, generator)
    return Dataset(name, train, test, tuple(characters), Normalize.of(train.x))


def _jittered(plates: Tensor, count: int, size: int, jitter: float, generator: torch.Generator) -> Examples:
    """Sample `count` views of each class from its plates (classes, fonts, side, side), the fonts in turn."""
    classes, fonts = plates.shape[:2]
    y = torch.arange(classes).repeat_interleave(count)
    font = (torch.arange(count).repeat(classes) + y) % fonts
    draws = (torch.rand(4, len(y), generator=generator) * 2 - 1) * jitter
    angle, scale = torch.deg2rad(draws[0] * TURN), 1 / (1 + draws[1] * GROW)
    cos, sin, (right, down) = angle.cos() * scale, angle.sin() * scale, draws[2:] * 2 * MOVE
    theta = torch.stack([cos, -sin, -right, sin, cos, -down], 1).view(-1, 2, 3)
    x = torch.empty(len(y), 1, size, size, dtype=torch.uint8)
    for rows in torch.arange(len(y)).split(2048):
        grid = affine_grid(theta[rows], [len(rows), 1, size, size], align_corners=False)
        views = grid_sample(plates[y[rows], font[rows]][:, None].float(), grid, align_corners=False)
        x[rows] = views.round_().to(torch.uint8)
    return Examples(x, y)


def _font(face: str, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_file(face), pixels, layout_engine=ImageFont.Layout.BASIC)


def _file(face: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FONTS[face]}.ttf"


def _ink(font: "ImageFont.FreeTypeFont", character: str) -> tuple[Image.Image, int]:
    """Draw one character, cut to its bounds; also the height of its upper edge above the baseline."""
    left, top, right, bottom = font.getbbox(character, anchor="ls")
    image = Image.new("L", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=font, anchor="ls")
    return image, round(-top)


def _plates(face: str, characters: str, side: int) -> Tensor:
    """Draw characters in one font on squares (N, side, side), on a common baseline; too large ones are shrunk."""
    font, room = _font(face, round(EM * side)), round(0.9 * side)
    plates = np.zeros((len(characters), side, side), np.uint8)
    baseline = round(side * (0.5 + 0.26 * EM))
    for plate, character in zip(plates, characters, strict=True):
        ink, rise = _ink(font, character)
        top = baseline - rise
        if max(ink.size) > room:
            ink = ImageOps.contain(ink, (room, room), Image.Resampling.BOX)
            top = (side - ink.height) // 2
        top, left = min(max(top, 0), side - ink.height), (side - ink.width) // 2
        plate[top : top + ink.height, left : left + ink.width] = np.asarray(ink)
    return torch.from_numpy(plates)


@lru_cache(maxsize=1)
def _covered() -> frozenset[str]:
    """The characters that every font has."""
    from matplotlib.ft2font import FT2Font

    codes = set.intersection(*(set(FT2Font(str(_file(face))).get_charmap()) for face in FONTS))
    return frozenset(map(chr, codes))


@lru_cache(maxsize=64)
def _script(scripts: tuple[str, ...]) -> str:
    """The characters of scripts that every font has; of several scripts, without look-alikes of earlier ones."""
    characters = "".join(c for c in chain.from_iterable(SCRIPTS[name] for name in scripts) if c in _covered())
    if len(scripts) == 1:
        return characters
    alike = _lookalikes(characters).tril(-1).any(1)
    return "".join(c for c, again in zip(characters, alike.tolist(), strict=True) if not again)


def _lookalikes(characters: str) -> Tensor:
    """Compare characters by shape, leaving out size and position: a symmetric boolean table (N, N)."""
    side = 24
    distance = torch.zeros(len(characters), len(characters))
    aspect = torch.zeros_like(distance)
    for face in FONTS:
        font = _font(face, 2 * side)
        inks = [_ink(font, character)[0] for character in characters]
        shapes = np.stack([np.asarray(ink.resize((side, side), Image.Resampling.BOX)) for ink in inks])
        shape = torch.from_numpy(shapes).float().flatten(1) / 255
        weight = shape.square().sum(1)
        ratio = torch.tensor([ink.width / ink.height for ink in inks]).log()
        distance += torch.cdist(shape, shape).square() / (weight[:, None] + weight) / len(FONTS)
        aspect += (ratio[:, None] - ratio).abs() / len(FONTS)
    letters = [character.lower() for character in characters]
    cases = torch.tensor([[a == b for b in letters] for a in letters])
    return (distance < torch.where(cases, ALIKE_CASES, ALIKE)) & (aspect < 0.35)

"""Where HCMM is tried: a stream, and a pretrained network whose head knows every class of it beforehand.

As in the paper, which has CLIP and its text head: no head is trained, a class that has not been learned yet is already
told from others, if less well ("zero-shot"), and networks are tested on all classes from the start. Here the encoder
has learned other images (Latin letters and digits; ImageNet) and the head compares with prototypes, the mean features
of a few examples that no task has. A seed draws everything anew: pretraining (but for ImageNet's), classes, the order
of classes or domains, images, support.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from clkit import checks, data, models
from clkit.data import Dataset, Examples, Normalize, Stream
from clkit.models.features import features
from clkit.tangent import Linearized
from clkit.training import Training
from studies.pretraining import Recipe, restored

Mode = Literal["ordinary", "tangent"]
SCRIPTS = ("greek", "cyrillic", "armenian", "georgian")
CLASSES, TRAINED, SHOTS, JITTER = 100, 40, 3, 1.5
FONTS = {"serif": ("serif", "serif-bold"), "mono": ("mono", "mono-bold"),
         "italic": ("serif-italic", "sans-oblique", "mono-oblique"), "sans": ("sans", "sans-bold")}  # fmt: skip
FONT_IMAGES = {"serif": 40, "mono": 20, "italic": 10, "sans": 5}
DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
FROZEN = 15  # blocks of EfficientNet-Lite0, of 16, that stay as ImageNet made them
APART = 10_000  # added to a seed for images that no task has

PRETRAINING = Training(12, 64, 3e-3, optimizer="adamw", schedule="cosine", warmup=0.1, weight_decay=0.01)


@dataclass(frozen=True)
class Setting:
    """A stream as a function of a seed, and what makes the network for one: `network(stream, seed=seed)`."""

    stream: Callable[[int], Stream]
    network: Callable[..., nn.Module]


def known(setting: str) -> Setting:
    """The setting of a name; ValueError, with close names, where there is none."""
    return SETTINGS[checks.choice("setting", setting, SETTINGS)]


@checks.arguments
def model(stream: Stream, setting: str, mode: Mode = "ordinary", *, seed: int = 0) -> nn.Module:
    """The network of a setting for its stream: an `encoder` and a `head`.

    In the mode "tangent" the encoder is linearised at its pretrained weights. The head is not: features are affine in
    the weights, and the head normalises them, as in the paper's code.

    Raises ValueError for a setting or a mode that is unknown.
    """
    net = known(setting).network(stream, seed=seed)
    if mode == "tangent":
        net.set_submodule("encoder", Linearized(net.get_submodule("encoder")))
    return net


def pretrained(
    stream: Stream, recipe: Recipe, support: Callable[[Stream, int], Examples], *, seed: int = 0
) -> nn.Module:
    """A network of `models.encoder`'s kind as a recipe trains it, with prototypes of support images in its head."""
    encoder = restored(recipe, seed)[0].get_submodule("encoder")
    shown = support(stream, seed)
    return models.with_prototypes(encoder, models.prototypes(encoder, stream[0].prepare(shown.x), shown.y))


def latin(seed: int = 0, fonts: tuple[str, ...] | None = None) -> Stream:
    """What encoders of glyphs are pretrained on: Latin letters and digits, 60 of each, as one task."""
    return data.split(data.glyphs(("latin", "digits"), fonts=fonts, per_class=60, seed=seed), 1)


def alphabet(seed: int = 0, classes: int = CLASSES) -> str:
    """Characters of Greek, Cyrillic, Armenian and Georgian that look unlike each other, drawn at random."""
    full = data.glyphs(SCRIPTS, per_class=1).classes
    order = torch.randperm(len(full), generator=torch.Generator().manual_seed(seed))
    return "".join(full[i] for i in order[:classes])


def glyphs(seed: int = 0, tasks: int = 20, classes: int = CLASSES) -> Stream:
    """A hundred characters in `tasks` tasks: 40 images of each to train on, 10 to test on, much jittered."""
    full = data.glyphs(characters=alphabet(seed, classes), per_class=TRAINED, jitter=JITTER, seed=seed)
    return data.split(replace(full, normalize=latin(seed)[0].normalize), tasks)


def rendered(
    stream: Stream, seed: int, fonts: tuple[str, ...] | None = None, shots: int = SHOTS, jitter: float = JITTER
) -> Examples:
    """A few images of every character of a stream, rendered apart from its own."""
    characters = "".join(name.rpartition("/")[2] for name in stream.classes)
    return data.glyphs(characters=characters, fonts=fonts, per_class=shots, jitter=jitter, seed=seed + APART).train


def fonts(seed: int = 0, classes: int = 60) -> Stream:
    """Sixty characters in four kinds of fonts, with 40, 20, 10 and 5 images a class, the third turned twice as far.

    The last one, upright sans, is what the encoder was pretrained on. All are tested on 10 images a class. The order is
    one for all seeds.
    """
    characters, sets = alphabet(seed, classes), {}
    for place, (name, faces) in enumerate(FONTS.items()):
        jitter = 2.0 if name == "italic" else 1.0
        full = data.glyphs(characters=characters, fonts=faces, per_class=TRAINED, jitter=jitter, seed=4 * seed + place)
        sets[name] = replace(full, train=first(full.train, FONT_IMAGES[name]))
    return data.domains(sets, normalize=latin(seed, FONTS["sans"])[0].normalize)


def first(examples: Examples, count: int, skip: int = 0) -> Examples:
    """The first `count` examples of every class after `skip` ones, in their order."""
    return examples[data.first_of_each(examples.y, count, skip)]


def images(name: str, limit: int, size: int | None = None) -> Dataset:
    """Real images by name (see `data.load`), so many a class and none augmented; nothing is downloaded."""
    return data.load(name, limit=limit, size=size, augment=data.NO_AUGMENT, download=False)


class Portions(NamedTuple):
    """How large a pack's images are shown, in pixels, and how many of a class are drawn of how many, and tested on."""

    size: int
    pool: int
    support: int
    trained: int
    tested: int


PORTIONS = {"pacs48": Portions(64, 60, 10, 30, 20), "cifar100": Portions(64, 60, 5, 15, 5)}


@cache
def seen(name: str) -> Dataset:
    """A pack's images as the frozen blocks of ImageNet's EfficientNet-Lite0 see them, which never changes.

    Inputs are what the first trained block is given, so that a run computes only what it trains.
    """
    portions = PORTIONS[name.partition("/")[0]]
    full = images(name, portions.pool)
    net = models.efficientnet_lite0(data.split(full, 1), size=portions.size)
    layer, test = f"encoder.net._blocks.{FROZEN - 1}", first(full.test, portions.tested)
    made = [Examples(features(net, full.normalize(p.x), layer, batch=64), p.y) for p in (full.train, test)]
    return replace(full, train=made[0], test=made[1], normalize=Normalize())


def drawn(name: str, seed: int, validate: bool = False) -> tuple[Dataset, Examples]:
    """What a seed draws of `seen`: a dataset, and examples for prototypes, which are in no part of it.

    With `validate` it is tested on training images that are in neither.
    """
    full, (_, _, support, trained, tested) = seen(name), PORTIONS[name.partition("/")[0]]
    rows = torch.randperm(len(full.train), generator=torch.Generator().manual_seed(seed))
    mixed = full.train[rows]
    test = first(mixed, tested, support + trained) if validate else full.test
    return replace(full, train=first(mixed, trained, support), test=test), first(mixed, support)


def pacs(seed: int = 0, validate: bool = False) -> Stream:
    """Photographs, paintings, cartoons and sketches of seven classes, in an order that the seed draws."""
    order = torch.randperm(len(DOMAINS), generator=torch.Generator().manual_seed(seed)).tolist()
    return data.domains({DOMAINS[i]: drawn(f"pacs48/{DOMAINS[i]}", seed, validate)[0] for i in order})


def cifar100(seed: int = 0, tasks: int = 10, validate: bool = False) -> Stream:
    """CIFAR-100 in an order of the classes that the seed draws."""
    return data.split(drawn("cifar100", seed, validate)[0], tasks, order=seed)


def lite(stream: Stream, name: str, *, seed: int = 0) -> nn.Module:
    """What is trained of ImageNet's EfficientNet-Lite0, its last block and convolution, under prototypes.

    The images that make these are the seed's. BatchNorm keeps ImageNet's statistics.
    """
    size = PORTIONS[name.partition("/")[0]].size
    net = models.efficientnet_lite0(data.split(images(name, 1), 1), size=size).get_submodule("encoder.net")
    end = [net.get_submodule(part) for part in ("_conv_head", "_bn1", "_swish")]
    blocks = list(net.get_submodule("_blocks").children())[FROZEN:]
    encoder = nn.Sequential(*blocks, *end, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    shown = drawn(name, seed)[1]
    return models.with_prototypes(encoder, models.prototypes(encoder, shown.x, shown.y))


def photographs(seed: int = 0, tasks: int = 10) -> Stream:
    """CIFAR-100 whole, at 224 pixels and normalised as CLIP has it, its classes in a random order."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return data.split(replace(data.load("cifar100", size=224), normalize=Normalize(mean, std)), tasks, order=seed)


GLYPHS = Recipe(models.encoder, PRETRAINING, latin)
SANS = Recipe(models.encoder, PRETRAINING, partial(latin, fonts=FONTS["sans"]))

SETTINGS: dict[str, Setting] = {
    "glyphs": Setting(glyphs, partial(pretrained, recipe=GLYPHS, support=rendered)),
    "fonts": Setting(
        fonts, partial(pretrained, recipe=SANS, support=partial(rendered, fonts=FONTS["sans"], jitter=1.0))
    ),
    "pacs": Setting(pacs, partial(lite, name="pacs48/photo")),
    "cifar100": Setting(cifar100, partial(lite, name="cifar100")),
    "cifar100, CLIP": Setting(photographs, models.clip),
}

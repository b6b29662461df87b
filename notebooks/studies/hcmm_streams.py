"""Where HCMM is tried: a stream, and a pretrained network whose head knows every class of it beforehand.

As in the paper, which has CLIP and its text head: no head is trained, a class that has not been learned yet is already
told from others, if less well ("zero-shot"), and networks are tested on all classes from the start. Here the encoder
has learned other images (Latin letters and digits; CIFAR-10) and the head compares with prototypes, the mean features
of a few examples that no task has. A seed draws everything anew: pretraining, classes, their order, images, support.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import nn

from clkit import checks, data, models
from clkit.data import Dataset, Examples, Normalize, Stream
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

    The last one, upright sans, is what the encoder was pretrained on. All are tested on 10 images a class.
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


def cifar10(seed: int = 0) -> Stream:
    """What encoders of photographs are pretrained on: CIFAR-10, 600 images a class, as one task."""
    return data.split(images("cifar10", 600), 1)


def cifar100(seed: int = 0, tasks: int = 20) -> Stream:
    """CIFAR-100 in a random order of the classes: 60 images of each to train on, 20 to test on."""
    full = images("cifar100", 100)
    chosen = replace(full, train=first(full.train, 60), test=first(full.test, 20), normalize=cifar10()[0].normalize)
    return data.split(chosen, tasks, order=seed)


def pacs(seed: int = 0) -> Stream:
    """Photographs, paintings, cartoons, sketches of seven classes, 60 images of each to train on, 48 pixels square."""
    sets = {name: images(f"pacs48/{name}", 100) for name in DOMAINS}
    sets = {name: replace(full, train=first(full.train, 60)) for name, full in sets.items()}
    return data.domains(sets, normalize=cifar10()[0].normalize)


def mnist_usps(seed: int = 0) -> Stream:
    """MNIST's digits, 200 of each, then those of USPS, 100 of each, at 28 x 28 pixels."""
    sets = {"mnist": images("mnist", 300), "usps": images("usps", 100, size=28)}
    sets["mnist"] = replace(sets["mnist"], train=first(sets["mnist"].train, 200), test=first(sets["mnist"].test, 100))
    return data.domains(sets, normalize=latin(seed)[0].normalize)


def spare(stream: Stream, seed: int, name: str) -> Examples:
    """Ten images a class of a pack that none of its tasks has."""
    return first(images(name, 100).train, 10, skip=60)


def photographs(seed: int = 0, tasks: int = 10) -> Stream:
    """CIFAR-100 whole, at 224 pixels and normalised as CLIP has it, its classes in a random order."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return data.split(replace(data.load("cifar100", size=224), normalize=Normalize(mean, std)), tasks, order=seed)


GLYPHS = Recipe(models.encoder, PRETRAINING, latin)
SANS = Recipe(models.encoder, PRETRAINING, partial(latin, fonts=FONTS["sans"]))
PHOTOGRAPHS = Recipe(partial(models.encoder, widths=(32, 64, 128), dim=128), PRETRAINING, cifar10)

SETTINGS: dict[str, Setting] = {
    "glyphs": Setting(glyphs, partial(pretrained, recipe=GLYPHS, support=rendered)),
    "fonts": Setting(
        fonts, partial(pretrained, recipe=SANS, support=partial(rendered, fonts=FONTS["sans"], jitter=1.0))
    ),
    "cifar100": Setting(cifar100, partial(pretrained, recipe=PHOTOGRAPHS, support=partial(spare, name="cifar100"))),
    "pacs": Setting(pacs, partial(pretrained, recipe=PHOTOGRAPHS, support=partial(spare, name="pacs48/photo"))),
    "mnist, usps": Setting(
        mnist_usps, partial(pretrained, recipe=GLYPHS, support=partial(rendered, shots=12, jitter=1.0))
    ),
    "cifar100, CLIP": Setting(photographs, models.clip),
}

"""Pretrained backbones without a download: networks that learned Latin characters, kept in the cache.

The later tasks are other scripts, so pretraining sees Latin alone. Backbones are trained by `clkit.training.run` when
first asked for, in one to two minutes on one core, and read from `backbones/` in the cache folder from then on.

All 52 letters are kept. At their natural sizes most of o/O, c/C, s/S can be told apart: the networks reach 0.98 to
0.99, and more than half of their errors confuse I with l or w with W. MobileNetV2 keeps torchvision's five
strides of 2: images of 28 x 28 become maps of 14, 7, 4, 2 and 1 pixels a side.
"""

from dataclasses import replace
from difflib import get_close_matches
from functools import partial

from torch import nn

from clkit import data, models
from clkit.training import Training
from studies.pretraining import Recipe, restored


def latin(seed: int = 0, *, per_class: int = 480, size: int = 28) -> data.Stream:
    """Latin glyphs as one task."""
    return data.split(data.glyphs("latin", per_class=per_class, size=size, seed=seed), 1)


COSINE = Training(optimizer="adamw", weight_decay=0.01, schedule="cosine", warmup=0.1, channels_last=True)
BACKBONES = {
    "convnet": Recipe(
        partial(models.convnet, widths=(16, 32, 32)), replace(COSINE, epochs=6, lr=2e-2), partial(latin, per_class=60)
    ),
    "mobilenet_v2": Recipe(
        partial(models.torchvision, name="mobilenet_v2", width_mult=0.35),
        replace(COSINE, epochs=5, batch=128, lr=2e-2),
        latin,
    ),
    "resnet18": Recipe(
        partial(models.resnet18, width=8), replace(COSINE, epochs=3, batch=128, lr=2e-2), partial(latin, per_class=300)
    ),
    "vit": Recipe(
        partial(models.vit, patch=7, dim=64, depth=4),
        replace(COSINE, epochs=6, batch=64, lr=3e-3, channels_last=False),
        latin,
    ),
}


def pretrained(name: str = "mobilenet_v2", *, seed: int = 0) -> nn.Module:
    """A network that has learned Latin glyphs, on the CPU and in training mode, with a head for the 52 letters.

    `name` is one of `BACKBONES`: torchvision's MobileNetV2 at 0.35 of its width, `models.resnet18` of width 8,
    `models.vit`, or, in seconds and less well, `models.convnet`. `seed` sets the images, their order and the initial
    weights. The network is trained when it is first asked for; what is kept belongs to the data, the architecture, the
    training, the seed, clkit's code and torch's version, so that a change of any makes another backbone. The caller
    may change the network, which is its own.
    Raises ValueError for an unknown name.
    """
    return restored(_recipe(name), seed)[0]


def untrained(name: str = "mobilenet_v2") -> nn.Module:
    """The network of a backbone with initial weights, to count by; in no time."""
    return _recipe(name).build(latin(per_class=1), seed=0)


def pretrained_accuracy(name: str = "mobilenet_v2", *, seed: int = 0) -> float:
    """The accuracy on the test glyphs of Latin, in [0, 1], that the backbone reached when it was trained."""
    return restored(_recipe(name), seed)[1]["accuracy"]


def _recipe(name: str) -> Recipe:
    if name not in BACKBONES:
        close = get_close_matches(str(name), BACKBONES, 1)
        raise ValueError(f"name: no backbone {name!r}; did you mean {close or list(BACKBONES)}?")
    return BACKBONES[name]

"""Image encoders whose classes are directions known beforehand: prototypes, and a frozen head that compares with them.

The stand-in for CLIP and its zero-shot text head (`models.clip`) that needs no download: what is learned later are the
encoder's weights alone, and every class has its output from the start.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.data import Stream
from clkit.models.common import image_shape, positive, seeded
from clkit.weights import evaluation_mode

SCALE = 20.0


class CosineHead(nn.Linear):
    """Features (N, F) to logits (N, C): `scale` times the cosine with each class's row of the weight."""

    def __init__(self, features: int, classes: int, scale: float = SCALE) -> None:
        super().__init__(features, classes, bias=False)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """The features as they are: both sides are normalised here."""
        return self.scale * F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1))

    def extra_repr(self) -> str:
        """The sizes and the scale."""
        return f"{super().extra_repr()}, scale={self.scale:g}"


def encoder(stream: Stream, widths: Sequence[int] = (16, 32, 64), dim: int = 64, *, seed: int = 0) -> nn.Module:
    """A convolutional encoder of images to `dim` features, without batch statistics, under a `CosineHead`.

    3x3 convolutions at stride 2 with GroupNorm (4 groups) and GELU, average pooling to 2 x 2, and a projection without
    a bias: `encoder` and `head` of what is returned. Images of any size; widths are multiples of 4.
    """
    positive("widths", *widths)
    positive("dim", dim)
    if any(width % 4 for width in widths):
        raise ValueError(f"widths: {tuple(widths)}; give multiples of 4, the number of groups that are normalised")
    before = image_shape(stream)[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with seeded(seed):
        for i, after in enumerate(widths, 1):
            layers[f"conv{i}"] = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers[f"norm{i}"] = nn.GroupNorm(4, after)
            layers[f"gelu{i}"] = nn.GELU()
            before = after
        layers["pool"] = nn.AdaptiveAvgPool2d(2)
        layers["flatten"] = nn.Flatten()
        layers["projection"] = nn.Linear(4 * before, dim, bias=False)
        head = CosineHead(dim, len(stream.classes))
    return nn.Sequential(OrderedDict(encoder=nn.Sequential(layers), head=head))


@torch.no_grad()
def prototypes(encoder: nn.Module, x: Tensor, y: Tensor, *, batch: int = 512) -> Tensor:
    """The direction (C, F) of every class: its examples' features, each of length 1, averaged, and of length 1 again.

    `x` (N, ...) are prepared inputs on the encoder's device, `y` (N,) their labels, every class from 0 on among them.
    CLIP's zero-shot head averages a class's prompts so (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).
    """
    classes = int(y.max()) + 1 if len(y) else 0
    counts = torch.bincount(y, minlength=classes)
    if not classes or not counts.all():
        missing = (counts == 0).nonzero().flatten().tolist()[:5]
        raise ValueError(f"y: classes {missing} have no example among {len(y)}; give at least one of each")
    with evaluation_mode(encoder):
        found = torch.cat([F.normalize(encoder(part), dim=-1) for part in x.split(batch)])
    return F.normalize(found.new_zeros(classes, found.shape[1]).index_add_(0, y, found), dim=-1)


def with_prototypes(encoder: nn.Module, directions: Tensor, scale: float = SCALE) -> nn.Module:
    """An encoder under a frozen head that knows every class's direction (C, F): only the encoder is trained.

    The network is `encoder` and `head`; the encoder is not copied.
    """
    classes, features = directions.shape
    with seeded(0), torch.no_grad():
        head = CosineHead(features, classes, scale).to(directions)
        head.weight.copy_(directions)
    return nn.Sequential(OrderedDict(encoder=encoder, head=head.requires_grad_(False)))

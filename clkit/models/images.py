"""Perceptrons and convolutional networks."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.data import Stream
from clkit.models.common import image_shape, positive, seeded


def mlp(stream: Stream, hidden: Sequence[int] = (100, 100), *, seed: int = 0) -> nn.Module:
    """A multi-layer perceptron with ReLU on flattened inputs: linear1, relu1, ..., linear.

    No hidden layers, `hidden=()`, make it softmax regression. Token streams are rejected: they need an embedding.
    """
    positive("hidden", *hidden)
    if stream[0].train.x.dtype == torch.int64:
        raise ValueError(f"stream: {stream.name!r} holds integer tokens, which a perceptron cannot read; use images")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    before = int(torch.Size(stream.shape).numel())
    with seeded(seed):
        for i, after in enumerate(hidden, 1):
            layers[f"linear{i}"] = nn.Linear(before, after)
            layers[f"relu{i}"] = nn.ReLU()
            before = after
        layers["linear"] = nn.Linear(before, len(stream.classes))
    return nn.Sequential(layers)


def convnet(stream: Stream, widths: Sequence[int] = (32, 64, 64), *, seed: int = 0) -> nn.Module:
    """A small convolutional network: 3x3 convolutions with BatchNorm and ReLU, global average pooling, linear.

    Every second convolution has stride 2. Takes images of any size.
    """
    positive("widths", *widths)
    before = image_shape(stream)[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with seeded(seed):
        for i, after in enumerate(widths, 1):
            layers[f"conv{i}"] = nn.Conv2d(before, after, 3, stride=1 + (i % 2 == 0), padding=1, bias=False)
            layers[f"norm{i}"] = nn.BatchNorm2d(after)
            layers[f"relu{i}"] = nn.ReLU()
            before = after
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["linear"] = nn.Linear(before, len(stream.classes))
    return nn.Sequential(layers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(after)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, after, H / stride, W / stride)."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def resnet18(stream: Stream, width: int = 64, *, seed: int = 0) -> nn.Module:
    """ResNet-18 with the stem for small images: 3x3 at stride 1, no max pooling; stages of width, 2, 4, 8 times width.

    Width 64 and 100 classes make 11,220,132 parameters, as in CLeWI (arXiv 2404.04002). Images of 8 x 8 pixels or more.
    """
    positive("width", width)
    channels = image_shape(stream, smallest=8)[0]
    with seeded(seed):
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(channels, width, 3, padding=1, bias=False), norm=nn.BatchNorm2d(width), relu=nn.ReLU()
        )
        before = width
        for stage in range(4):
            after, stride = width * 2**stage, 1 if stage == 0 else 2
            layers[f"stage{stage + 1}"] = nn.Sequential(BasicBlock(before, after, stride), BasicBlock(after, after, 1))
            before = after
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["linear"] = nn.Linear(before, len(stream.classes))
    return nn.Sequential(layers)

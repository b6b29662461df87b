"""What factories share: initial weights from a seed, and what they ask of a stream's inputs."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from clkit.data import Stream


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws initial weights on the CPU from `seed`; the random states of all devices stay as they were."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def image_shape(stream: Stream, smallest: int = 1, channels: Collection[int] = ()) -> tuple[int, int, int]:
    """Channels, height and width of a stream's images.

    `channels` lists the numbers of channels that a network takes (default: any). Raises ValueError for inputs that
    are no images, for images with a side below `smallest`, and for other numbers of channels.
    """
    if len(stream.shape) != 3:
        raise ValueError(
            f"stream: its inputs have shape {stream.shape}, this network takes images (C, H, W); "
            "use models.mlp for vectors"
        )
    own, height, width = stream.shape
    if channels and own not in channels:
        raise ValueError(
            f"stream: images have {own} channels, this network takes {' or '.join(map(str, channels))}; "
            "use models.convnet or models.encoder"
        )
    if min(height, width) < smallest:
        raise ValueError(
            f"stream: images of {height} x {width} are too small for this network; enlarge them to "
            f"{smallest} x {smallest} or use models.convnet"
        )
    return own, height, width


def context_length(stream: Stream) -> int:
    """The number L of tokens in each of a stream's inputs (N, L); raises ValueError for other inputs."""
    dtype = stream[0].train.x.dtype
    if len(stream.shape) != 1 or dtype != torch.int64:
        raise ValueError(
            f"stream: {stream.name!r} has inputs {stream.shape} of {dtype}, a language model reads integer tokens "
            "(L,); use data.texts with the model's tokenizer, or models.vit for images"
        )
    return stream.shape[0]


@torch.no_grad()
def take_grey(model: nn.Module) -> None:
    """Sums the first convolution over its input channels, in place: the function of a grey image repeated in three."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.weight = nn.Parameter(first.weight.sum(1, keepdim=True))
    first.in_channels = 1

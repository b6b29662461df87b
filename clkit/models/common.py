"""What factories share: initial weights from a seed, checks of their arguments, and the features of any model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clkit.data import Stream
from clkit.weights import evaluation_mode


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws initial weights on the CPU from `seed`; the random states of all devices stay as they were."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def image_shape(stream: Stream, smallest: int = 1) -> tuple[int, int, int]:
    """Channels, height and width of a stream's images, or a ValueError for other inputs and smaller images."""
    if len(stream.shape) != 3:
        raise ValueError(
            f"stream: its inputs have shape {stream.shape}, this network takes images (C, H, W); "
            "use models.mlp for vectors"
        )
    channels, height, width = stream.shape
    if min(height, width) < smallest:
        raise ValueError(
            f"stream: images of {height} x {width} are too small for this network; enlarge them to "
            f"{smallest} x {smallest} or use models.convnet"
        )
    return channels, height, width


def positive(name: str, *values: int) -> None:
    """Raises ValueError unless all values are whole numbers from 1 on."""
    for value in values:
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r} is not a whole number from 1 on")


def features(model: nn.Module, x: Tensor, *, batch: int = 512) -> Tensor:
    """The inputs of the last linear layer that `model` runs, in evaluation mode: what it represents `x` by.

    `x` (N, ...) is prepared input on the model's device; the features are (N, F), or (N, L, F) for tokens. The
    model's modes are restored. Raises ValueError for a model without a linear layer and for empty `x`.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError(f"model: {type(model).__name__} has no nn.Linear, whose inputs would be its features")
    if not len(x):
        raise ValueError("x: there are no rows; pass at least one")
    positive("batch", batch)
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.__setitem__(slice(None), args)) for m in linears]
    parts = []
    try:
        with torch.no_grad(), evaluation_mode(model):
            for rows in x.split(batch):
                model(rows)
                parts.append(seen[0])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(parts)


@torch.no_grad()
def take_grey(model: nn.Module) -> None:
    """Sums the first convolution over its input channels, in place: the function of a grey image repeated in three."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.weight = nn.Parameter(first.weight.sum(1, keepdim=True))
    first.in_channels = 1

"""Weight modulation: a training step against a plain one of the same network, and a folded task against the backbone.

A step is what `training.run` does: forward, backward and AdamW; the plain one trains every weight. Batches of 32 images
of 28 x 28 pixels on the device that torch has, with one CPU thread.
"""

from collections.abc import Callable

import torch
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn.functional import cross_entropy

from clkit import models
from clkit.benchmarks import Row, interleaved, row
from clkit.benchmarks.training import digits_like
from clkit.modulation import Modulated, Modulation

BATCH, CLASSES, REPEATS, STEPS = 32, 10, 9, 5


def networks() -> dict[str, nn.Module]:
    """The networks that are measured, in channels-last."""
    stream = digits_like(BATCH)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = {
        "MobileNetV2 x0.35": models.torchvision(stream, "mobilenet_v2", width_mult=0.35),
        "MobileNetV2 x1": models.torchvision(stream, "mobilenet_v2"),
        "ResNet-18, width 16": models.resnet18(stream, width=16),
    }
    return {name: net.to(device).to(memory_format=torch.channels_last) for name, net in made.items()}


def step(net: nn.Module) -> Callable[[], None]:
    """A few training steps of what wants a gradient in a network, on the same batch."""
    net.train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, weight_decay=0)
    x, y = _batch(net)

    def run() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
        _finish(x)

    return run


def inference(net: nn.Module) -> Callable[[], None]:
    """A few forward passes without gradients."""
    net.eval()
    x, _ = _batch(net)

    @torch.no_grad()
    def run() -> None:
        for _ in range(STEPS):
            net(x)
        _finish(x)

    return run


def bench() -> list[Row]:
    """Seconds a step and a pass: ours is the modulated one, so a ratio above 1 says how much slower it is."""
    table = []
    with threadpool_limits(1):
        for name, backbone in networks().items():
            made = Modulated(backbone, Modulation(4, 4))
            folded = made.folded(made.state(range(CLASSES)))
            pairs = {
                f"step of {name}, modulated / plain": (step(made), step(backbone)),
                f"inference of {name}, folded / backbone": (inference(folded), inference(Modulated(backbone).backbone)),
            }
            for title, (ours, theirs) in pairs.items():
                seconds = interleaved({"ours": ours, "theirs": theirs}, REPEATS)
                table.append(row(title, "seconds", seconds["ours"] / STEPS, seconds["theirs"] / STEPS))
    return table


def _batch(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    device = next(net.parameters()).device
    g = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 1, 28, 28, generator=g).to(device).to(memory_format=torch.channels_last)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=g).to(device)


def _finish(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)

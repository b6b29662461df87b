"""Networks made of networks: training steps of a linearised and of a modulated one against those of the network itself.

The tangent step: cross entropy on 64 random images of 28 x 28, backward, plain SGD; one CPU thread. Where matrix
products take the time, an ordinary step is three passes (forward, and two backward). A tangent step is five, since a
tangent passes through every layer twice: its rate can be 0.6 of the ordinary one. The perceptron's step is half a
millisecond, to which a hundred calls from Python add as much.

The modulated step is what `training.run` does: forward, backward and AdamW; the plain one trains every weight. Batches
of 32 images of 28 x 28 pixels on the device that torch has, with one CPU thread.
"""

from collections.abc import Callable
from functools import partial

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from clkit import models
from clkit.benchmarks import Row, apart, interleaved, row
from clkit.benchmarks.training import digits_like
from clkit.modulation import Modulated, Modulation
from clkit.tangent import Linearized

ROWS, TURNS = 64, 11
NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "mlp": (models.mlp, 100),
    "convnet": (models.convnet, 2),
    "encoder": (models.encoder, 4),
    "resnet18 of width 16": (partial(models.resnet18, width=16), 1),
    "vit": (models.vit, 2),
}
"""Factories, and how many steps are timed together."""


class ByJvp(Linearized):
    """The definition as most code has it: forward mode through the network, and a graph of all of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Prepared inputs to logits."""
        theta, point = dict(self.named_parameters()), dict(self.network.named_parameters())
        steps = {name: theta[name] - p for name, p in point.items()}
        with sdpa_kernel(SDPBackend.MATH):
            pair = jvp(lambda p: functional_call(self.network, p, (x,)), (point,), (steps,))
        return pair[0] + pair[1]


def seconds_of(name: str) -> dict[str, float]:
    """The seconds of a step of one network in each way, interleaved, in this process as it stands."""
    factory, steps = NETWORKS[name]
    net = factory(digits_like(ROWS))
    x = torch.randn(ROWS, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.arange(ROWS) % 10

    def train(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def go() -> None:
            for _ in range(steps):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()

        go()
        return go

    ways = {"ours": train(Linearized(net)), "ordinary": train(net), "jvp": train(ByJvp(net))}
    return {way: seconds / steps for way, seconds in interleaved(ways, TURNS).items()}


def tangent_steps() -> list[Row]:
    """Our steps a second over each other's, one process a network."""
    table = []
    for name in NETWORKS:
        seconds = apart(seconds_of, name)
        for way, words in (("ordinary", "an ordinary step"), ("jvp", "by torch.func.jvp")):
            title = f"tangent step of {name} / {words}"
            table.append(row(title, "steps a second", 1 / seconds["ours"], 1 / seconds[way]))
    return table


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


def modulated_steps() -> list[Row]:
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


BENCHMARKS = {"tangent": tangent_steps, "modulation": modulated_steps}

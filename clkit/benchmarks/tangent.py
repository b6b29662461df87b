"""A training step of a linearised network against one of the network itself, and against torch.func.jvp as it is.

The work: cross entropy on 64 random images of 28 x 28, backward, plain SGD; one CPU thread. Where matrix products take
the time, an ordinary step is three passes (forward, and two backward) and a tangent step five, since a tangent passes
through every layer twice: its rate can be 0.6 of the ordinary one. The perceptron's step is half a millisecond, to
which a hundred calls from Python add as much.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from clkit import models
from clkit.benchmarks import Row, apart, interleaved, row
from clkit.benchmarks.training import digits_like
from clkit.tangent import Linearized

ROWS, REPEATS = 64, 11
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


def measure(name: str) -> dict[str, float]:
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
    return {way: seconds / steps for way, seconds in interleaved(ways, REPEATS).items()}


def bench() -> list[Row]:
    """Our steps a second over each other's, one process a network."""
    table = []
    for name in NETWORKS:
        seconds = apart(measure, name)
        for way, words in (("ordinary", "an ordinary step"), ("jvp", "by torch.func.jvp")):
            title = f"tangent step of {name} / {words}"
            table.append(row(title, "steps a second", 1 / seconds["ours"], 1 / seconds[way]))
    return table

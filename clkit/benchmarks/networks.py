"""Steps of a linearised and of a modulated network, and the alignment of two, against the naive ways.

The tangent step: cross entropy on 64 random images of 28 x 28, backward, plain SGD; one CPU thread. Where matrix
products take the time, an ordinary step is three passes (forward, and two backward). A tangent step is five, since a
tangent passes through every layer twice: its rate can be 0.6 of the ordinary one. The perceptron's step is half a
millisecond, to which a hundred calls from Python add as much.

The modulated step is what `training.run` does: forward, backward and AdamW; the plain one trains every weight. Batches
of 32 images of 28 x 28 pixels on the device that torch has, with one CPU thread.

The alignment: ResNet-18 with the stem for small images, 200 images of 32 x 32, one CPU thread, in one pass against the
forward passes alone, and against one prefix network for each permutation. CLeWI's released code (arXiv 2404.04002)
finds each of 13 permutations from activations that it gets by running both networks from the input up to there, once
for means and products and once more for deviations. It puts a convolution with identity weights into every shortcut.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from clkit import alignment, data, models
from clkit.benchmarks import Row, apart, interleaved, row
from clkit.benchmarks.training import digits_like
from clkit.modulation import Modulated, Modulation
from clkit.tangent import Linearized
from clkit.weights import get_weights

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


IMAGES, PART, ROUNDS = 200, 25, 3


def prefixes(net: nn.Module) -> Iterator[nn.Module]:
    """The networks up to each place of the 13 permutations: stem, inside of every block, end of every stage."""

    net = copy.deepcopy(net)
    for block in (m for m in net.modules() if isinstance(m, models.BasicBlock)):
        width = block.conv2.out_channels
        if not len(block.shortcut):
            identity = nn.Conv2d(width, width, 1, bias=False)
            nn.init.dirac_(identity.weight)
            block.shortcut.append(identity)
    modules = [m for part in net.children() for m in (part if isinstance(part, nn.Sequential) else [part])]
    blocks = 0
    for k, module in enumerate(modules):
        if isinstance(module, models.BasicBlock):
            yield nn.Sequential(*modules[:k], module.conv1, module.norm1, nn.ReLU())
            blocks += 1
        if isinstance(module, nn.BatchNorm2d) or (isinstance(module, models.BasicBlock) and blocks % 2 == 0):
            yield nn.Sequential(*modules[: k + 1])


def correlation(first: nn.Module, second: nn.Module, batches: list[Tensor]) -> Tensor:
    """Pearson's correlation of the channels of two networks, in two passes."""

    def channels(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).movedim(1, -1).flatten(0, -2).double()

    count, means, outer, squares = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for x in batches:
        a, b = channels(first, x), channels(second, x)
        count, means, outer = count + len(a), means + torch.stack([a.sum(0), b.sum(0)]), outer + a.T @ b
    means = means / count
    for x in batches:
        a, b = channels(first, x), channels(second, x)
        squares = squares + torch.stack([(a - means[0]).square().sum(0), (b - means[1]).square().sum(0)])
    deviations = (squares / count).sqrt()
    return (outer / count - torch.outer(*means)) / (torch.outer(*deviations) + 1e-12)


@torch.no_grad()
def alignment_seconds() -> dict[str, float]:
    """Seconds of each way, interleaved, in this process as it stands."""
    from scipy.optimize import linear_sum_assignment

    g = torch.Generator().manual_seed(0)
    rows = data.Examples(torch.randint(0, 256, (2, 3, 32, 32), generator=g, dtype=torch.uint8), torch.arange(2))
    task = data.Task(0, "bytes", tuple(range(10)), rows, rows, data.Normalize((0.5,) * 3, (0.25,) * 3))
    stream = data.Stream("bytes", (task,), tuple(map(str, range(10))))
    nets = [models.resnet18(stream, seed=seed).eval() for seed in (0, 1)]
    x = torch.randn(IMAGES, 3, 32, 32, generator=g)
    batches = list(x.split(PART))
    symmetry = alignment.symmetry(nets[0], x[:2])
    first, second = map(get_weights, nets)
    places = [list(prefixes(net)) for net in nets]

    def forward() -> None:
        for net in nets:
            for batch in batches:
                net(batch)

    def by_prefix() -> None:
        for pair in zip(*places, strict=True):
            linear_sum_assignment(correlation(pair[0], pair[1], batches).numpy(), maximize=True)

    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: alignment.align(symmetry, nets[0], first, second, x, batch=PART),
        "forward": forward,
        "prefixes": by_prefix,
    }
    forward()
    return interleaved(ways, ROUNDS)


def alignments() -> list[Row]:
    """Our rate over each other's."""
    seconds = apart(alignment_seconds)
    names = {"prefixes": "a prefix network each", "forward": "the two forward passes alone"}
    return [
        row(f"alignment / {words}", "alignments a second", 1 / seconds["ours"], 1 / seconds[way])
        for way, words in names.items()
    ]


BENCHMARKS = {"tangent": tangent_steps, "modulation": modulated_steps, "alignment": alignments}

"""Alignment in one pass against the forward passes alone, and against one prefix network for each permutation.

The work: ResNet-18 with the stem for small images, 200 images of 32 x 32, one CPU thread. CLeWI's released code
(arXiv 2404.04002) finds each of 13 permutations from activations that it gets by running both networks from the
input up to there, once for means and products and once more for deviations; it puts a convolution with identity
weights into every shortcut before.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from clkit import alignment, data, models
from clkit.benchmarks import Row, apart, interleaved, row
from clkit.weights import get_weights

IMAGES, BATCH, REPEATS = 200, 25, 3


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
def measure() -> dict[str, float]:
    """Seconds of each way, interleaved, in this process as it stands."""
    from scipy.optimize import linear_sum_assignment

    g = torch.Generator().manual_seed(0)
    rows = data.Examples(torch.randint(0, 256, (2, 3, 32, 32), generator=g, dtype=torch.uint8), torch.arange(2))
    task = data.Task(0, "bytes", tuple(range(10)), rows, rows, data.Normalize((0.5,) * 3, (0.25,) * 3))
    stream = data.Stream("bytes", (task,), tuple(map(str, range(10))))
    nets = [models.resnet18(stream, seed=seed).eval() for seed in (0, 1)]
    x = torch.randn(IMAGES, 3, 32, 32, generator=g)
    batches = list(x.split(BATCH))
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
        "ours": lambda: alignment.align(symmetry, nets[0], first, second, x, batch=BATCH),
        "forward": forward,
        "prefixes": by_prefix,
    }
    forward()
    return interleaved(ways, REPEATS)


def alignments() -> list[Row]:
    """Our rate over each other's."""
    seconds = apart(measure)
    names = {"prefixes": "a prefix network each", "forward": "the two forward passes alone"}
    return [
        row(f"alignment / {words}", "alignments a second", 1 / seconds["ours"], 1 / seconds[way])
        for way, words in names.items()
    ]


BENCHMARKS = {"alignment": alignments}

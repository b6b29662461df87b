"""Each claim about speed, measured against the naive way in one run: every benchmark gives rows of ratios.

- training: the resident loop against loops that a DataLoader feeds. A perceptron 784-100-100-10, plain SGD, replay of
  64 rows from a reservoir of 500 beside every batch of 64, one epoch. The DataLoader loops hold the memory as most
  replay code does, a list that is filled row by row.
- memory: writes into a reservoir, against a row at a time, and against a training step of that perceptron.
- consolidation: a run with a consolidation against one without.
- weights: five networks of ResNet-18's shapes. The traffic of sums is ideal: every input read once, the result written
  once. A result that is allocated is written to fresh memory, which the system has to hand out first; so is that of
  `clone`.
- merging: TIES in pieces against TIES by sorting, in processes of its own, each way in another, for its time and the
  most memory it needs.
- tangent: cross entropy on 64 random images of 28 x 28, backward, plain SGD. Where matrix products take the time, an
  ordinary step is three passes (forward, and two backward). A tangent step is five, since a tangent passes through
  every layer twice: its rate can be 0.6 of the ordinary one. The perceptron's step is half a millisecond, to which a
  hundred calls from Python add as much.
- modulation: what `training.run` does in a step, forward, backward and AdamW; the plain one trains every weight.
  Batches of 32 images of 28 x 28 pixels on the device that torch has.
- alignment: ResNet-18 with the stem for small images, 200 images of 32 x 32, in one pass against the forward passes
  alone, and against one prefix network for each permutation. CLeWI's released code (arXiv 2404.04002) finds each of 13
  permutations from activations that it gets by running both networks from the input up to there, once for means and
  products and once more for deviations. It puts a convolution with identity weights into every shortcut.

The CPU has one thread, in a process of its own where other work would tell.
"""

import copy
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from clkit import alignment, checks, data, models
from clkit.consolidation import EMA, SFA, Consolidation, NoConsolidation
from clkit.learners import ER
from clkit.memory import Memory
from clkit.merging import average, task_arithmetic, ties
from clkit.modulation import Modulated, Modulation
from clkit.tangent import Linearized
from clkit.training import Training, run
from clkit.weights import Weights, combine, get_weights, lerp

Row = dict[str, object]
Way = Callable[[], object]


def benchmarks() -> dict[str, Callable[[], list[Row]]]:
    """The benchmarks by name."""
    return {
        "training": training, "memory": memory_writes, "consolidation": consolidation, "weights": sums,
        "merging": ties_by_sorting, "tangent": tangent_steps, "modulation": modulated_steps, "alignment": alignments,
    }  # fmt: skip


def rows(names: Sequence[str] = (), progress: bool = True) -> Iterator[Row]:
    """Runs benchmarks, by default all, one after another, and yields their rows: name, unit, ours, theirs, ratio.

    Raises ValueError on an unknown name before any is run.
    """
    known = benchmarks()
    for name in names:
        checks.choice("benchmark", name, known)
    for name in tqdm(names or list(known), disable=not progress, unit="benchmark"):
        yield from known[name]()


def interleaved(
    ways: Mapping[str, Way], repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median seconds by `clock` that each way takes, of `repeats`, taking turns: a slow minute slows them all.

    Each goes once before, and that does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = clock()
            way()
            seconds[name].append(clock() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def apart(measure: Callable[..., Any], *arguments: str) -> Any:
    """What a function of this file gives, a JSON value, called with texts in a new process of one thread and no GPU."""
    code = f"import json, sys; from {__name__} import {measure.__name__} as f; print(json.dumps(f(*sys.argv[1:])))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{measure.__name__} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def row(name: str, unit: str, ours: float, theirs: float) -> Row:
    """A row of the table: two numbers of one unit, and ours over theirs."""
    return {"name": name, "unit": unit, "ours": ours, "theirs": theirs, "ratio": ours / theirs}


BATCH, MEAN, STD = 64, 0.1307, 0.3081


def digits_like(count: int) -> data.Stream:
    """One task of random bytes in MNIST's format."""
    g = torch.Generator().manual_seed(0)

    def examples(count: int) -> data.Examples:
        images = torch.randint(0, 256, (count, 1, 28, 28), generator=g, dtype=torch.uint8)
        return data.Examples(images, torch.randint(0, 10, (count,), generator=g))

    labels = tuple(range(10))
    task = data.Task(0, "bytes", labels, examples(count), examples(10), data.Normalize((MEAN,), (STD,)))
    return data.Stream("bytes", (task,), tuple(map(str, labels)))


def steps(net: nn.Module, x: Tensor, y: Tensor, count: int, optimizer: Callable[..., torch.optim.Optimizer]) -> Way:
    """So many training steps of what wants a gradient in a network, on the same batch."""
    net.train()
    stepper = optimizer([p for p in net.parameters() if p.requires_grad])

    def go() -> None:
        for _ in range(count):
            stepper.zero_grad()
            cross_entropy(net(x), y).backward()
            stepper.step()
        _finish(x)

    return go


def _finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


SGD = partial(torch.optim.SGD, lr=0.01)
ROWS, MEMORY, OFFERED = 12_000, 500, 4096


def loaded(stream: data.Stream, dataset: torch.utils.data.Dataset) -> None:
    """The training of our loop, fed by a DataLoader and with a list for a memory."""
    net, memory, seen = models.mlp(stream), [], 0
    optimizer = SGD(net.parameters())
    for x, y in torch.utils.data.DataLoader(dataset, BATCH, shuffle=True):
        old = random.sample(memory, min(BATCH, len(memory)))
        inputs = torch.cat([x, torch.stack([m[0] for m in old])]) if old else x
        labels = torch.cat([y, torch.stack([m[1] for m in old])]) if old else y
        optimizer.zero_grad()
        cross_entropy(net(inputs), labels).backward()
        optimizer.step()
        for pair in zip(x, y, strict=True):
            if len(memory) < MEMORY:
                memory.append(pair)
            elif (slot := random.randrange(seen + 1)) < MEMORY:
                memory[slot] = pair
            seen += 1


class Images(torch.utils.data.Dataset):
    """Images the way torchvision serves MNIST: a PIL image per row, then transforms."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        from torchvision import transforms

        self.x, self.y = x[:, 0], y
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple:
        from PIL import Image

        return self.transform(Image.fromarray(self.x[row].numpy())), self.y[row]


def rows_a_second() -> dict[str, float]:
    """Rows a second of each loop, interleaved, in this process as it stands."""
    stream = digits_like(ROWS)
    task, recipe = stream[0], Training(1, BATCH, 0.01)
    tensors = torch.utils.data.TensorDataset(task.prepare(task.train.x), task.train.y)
    images = Images(task.train.x, task.train.y)
    loops: dict[str, Way] = {
        "resident": lambda: run(stream, models.mlp, ER(MEMORY), None, recipe, device="cpu", progress=False, keep=False),
        "DataLoader over tensors": lambda: loaded(stream, tensors),
        "DataLoader over images": lambda: loaded(stream, images),
    }
    return {name: ROWS / seconds for name, seconds in interleaved(loops).items()}


def training() -> list[Row]:
    """Our rate over each other's."""
    rates = apart(rows_a_second)
    ours = rates.pop("resident")
    return [row(f"ER training, resident / {name}", "images a second", ours, rate) for name, rate in rates.items()]


def memory_writes() -> list[Row]:
    """Rows a second offered to a reservoir of bytes in the format of MNIST; then a write as a share of a step."""
    stream, g = digits_like(OFFERED), torch.Generator().manual_seed(0)
    x, y = stream[0].train.x, stream[0].train.y

    def vectorised() -> None:
        memory = Memory(MEMORY)
        for start in range(0, OFFERED, BATCH):
            memory.offer(g, x=x[start : start + BATCH], y=y[start : start + BATCH])

    def one_by_one() -> None:
        xs, ys = torch.zeros((MEMORY, *x.shape[1:]), dtype=x.dtype), torch.zeros(MEMORY, dtype=y.dtype)
        for seen in range(OFFERED):
            slot = seen if seen < MEMORY else random.randrange(seen + 1)
            if slot < MEMORY:
                xs[slot], ys[slot] = x[seen], y[seen]

    step = steps(models.mlp(stream), x[: 2 * BATCH] / 255, y[: 2 * BATCH], OFFERED // BATCH, SGD)
    seconds = interleaved({"ours": vectorised, "theirs": one_by_one, "steps": step})
    ours, theirs, stepped = (OFFERED / s for s in seconds.values())
    return [
        row("memory write, a batch / a row at a time", "rows a second", ours, theirs),
        row("memory write / the perceptron's training step", "rows a second", ours, stepped),
    ]


def process_seconds() -> dict[str, float]:
    """Seconds of the CPU of a run with each consolidation, by its name, in this process as it stands."""
    one, recipe = digits_like(ROWS // 2), Training(1, BATCH, 0.01)
    tasks = tuple(replace(one[0], index=index) for index in range(3))
    stream = data.Stream("bytes", tasks, one.classes, "domain")

    def learn(rule: Consolidation) -> None:
        run(stream, models.mlp, None, rule, recipe, device="cpu", progress=False, keep=False)

    rules: list[Consolidation] = [NoConsolidation(), EMA(), SFA(p=0.02)]
    return interleaved({type(rule).__name__: partial(learn, rule) for rule in rules}, clock=time.process_time)


def consolidation() -> list[Row]:
    """The seconds of each consolidation over those of none."""
    none, ema, sfa = apart(process_seconds).values()
    rules = {"EMA()": ema, "SFA(p=0.02)": sfa}
    return [row(f"a run with {rule} / without", "seconds of CPU", seconds, none) for rule, seconds in rules.items()]


def resnet18(seed: int) -> dict[str, Tensor]:
    """Random numbers in the shapes of torchvision's ResNet-18 for 10 classes: 11.2 million."""
    from torchvision.models import resnet18

    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name.replace("running_", ""): t.shape for name, t in resnet18(num_classes=10).state_dict().items()}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def bandwidths() -> dict[str, float]:
    """Gigabytes a second of each way, interleaved, in this process as it stands."""
    *ws, base = (resnet18(seed) for seed in range(6))
    out = resnet18(9)
    ways: dict[str, tuple[int, Way]] = {
        "copy": (2, lambda: [out[name].copy_(t) for name, t in base.items()]),
        "clone": (2, lambda: {name: t.clone() for name, t in base.items()}),
        "lerp into place": (3, lambda: lerp(ws[0], ws[1], 0.3, out=out)),
        "lerp": (3, lambda: lerp(ws[0], ws[1], 0.3)),
        "lerp, written out": (3, lambda: {name: (1 - 0.3) * t + 0.3 * ws[1][name] for name, t in ws[0].items()}),
        "average of 5 into place": (6, lambda: combine(ws, [0.2] * 5, out=out)),
        "average of 5": (6, lambda: average(ws)),
        "average of 5, written out": (6, lambda: {name: sum(w[name] for w in ws) / 5 for name in ws[0]}),
        "task arithmetic of 5 into place": (7, lambda: combine([base, *ws], [-0.5, *[0.3] * 5], out=out)),
        "task arithmetic of 5": (7, lambda: task_arithmetic(ws, base=base, scale=0.3)),
        "task arithmetic of 5, written out": (
            7,
            lambda: {name: t + 0.3 * sum(w[name] - t for w in ws) for name, t in base.items()},
        ),
    }
    size = sum(t.nbytes for t in base.values()) / 1e9
    seconds = interleaved({name: way for name, (_, way) in ways.items()}, 9)
    return {name: networks * size / seconds[name] for name, (networks, _) in ways.items()}


def sums() -> list[Row]:
    """Each sum against copying into place and, where it allocates its result, against cloning and plain code."""
    rates = apart(bandwidths)
    table = []
    for name in ("lerp", "average of 5", "task arithmetic of 5"):
        pairs = [(f"{name} into place", "copy"), (name, "copy"), (name, "clone"), (name, f"{name}, written out")]
        table += [row(f"{a} / {b}", "GB a second", rates[a], rates[b]) for a, b in pairs]
    return table


TASKS, PROCESSES = 5, 3


def by_sorting(ws: list[dict[str, Tensor]], base: Weights, density: float = 0.2) -> dict[str, Tensor]:
    """TIES as it is mostly written: all task vectors stacked, magnitudes sorted."""
    origin = torch.cat([t.flatten() for t in base.values()])
    vectors = torch.stack([torch.cat([t.flatten() for t in w.values()]) for w in ws]) - origin
    keep = int(density * vectors.shape[1])
    vectors = vectors * (vectors.abs() >= vectors.abs().sort(1, descending=True).values[:, keep - 1 : keep])
    agree = vectors.sign() == vectors.sum(0).sign()
    merged = origin + (vectors * agree).sum(0) / (agree & (vectors != 0)).sum(0).clamp(min=1)
    parts = merged.split([t.numel() for t in base.values()])
    return {name: part.view_as(t) for part, (name, t) in zip(parts, base.items(), strict=True)}


def one_merge(way: str) -> dict[str, float]:
    """The seconds that one way takes, and the memory it needs at most, in networks."""
    *ws, base = (resnet18(seed) for seed in range(TASKS + 1))
    network = sum(t.nbytes for t in base.values())
    small = [{"w": w["fc.weight"]} for w in (*ws, base)]  # loads the code, which would count as memory
    ties(small[:-1], base=small[-1])
    by_sorting(small[:-1], small[-1])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    ties(ws, base=base) if way == "pieces" else by_sorting(ws, base)
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / network
    return {"seconds": seconds, "networks": TASKS + 1 + grown}


def ties_by_sorting() -> list[Row]:
    """Merges a second, and networks in memory at most; medians over processes, taking turns."""
    found = [(apart(one_merge, "pieces"), apart(one_merge, "sorting")) for _ in range(PROCESSES)]
    (ours, most), (theirs, their_most) = (
        [statistics.median(results[key] for results in way) for key in ("seconds", "networks")]
        for way in zip(*found, strict=True)
    )
    return [
        row(f"TIES of {TASKS}, pieces / sorting", "merges a second", 1 / ours, 1 / theirs),
        row(f"memory of TIES of {TASKS}, pieces / sorting", "networks at most", most, their_most),
    ]


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
    factory, count = NETWORKS[name]
    stream = digits_like(BATCH)
    net, batch = factory(stream), stream[0].batch(slice(None))
    nets = {"ours": Linearized(net), "ordinary": net, "jvp": ByJvp(net)}
    ways = {way: steps(made, batch.x, batch.y, count, SGD) for way, made in nets.items()}
    return {way: seconds / count for way, seconds in interleaved(ways, 11).items()}


def tangent_steps() -> list[Row]:
    """Our steps a second over each other's, one process a network."""
    table = []
    for name in NETWORKS:
        seconds = apart(seconds_of, name)
        for way, words in (("ordinary", "an ordinary step"), ("jvp", "by torch.func.jvp")):
            title = f"tangent step of {name} / {words}"
            table.append(row(title, "steps a second", 1 / seconds["ours"], 1 / seconds[way]))
    return table


STEPS = 5  # timed together
ADAMW = partial(torch.optim.AdamW, lr=1e-4, weight_decay=0)


def inference(net: nn.Module, x: Tensor) -> Way:
    """A few forward passes without gradients."""
    net.eval()

    @torch.no_grad()
    def go() -> None:
        for _ in range(STEPS):
            net(x)
        _finish(x)

    return go


def modulated_steps() -> list[Row]:
    """Seconds a step and a pass: ours is the modulated one, so a ratio above 1 says how much slower it is."""
    table, stream, device = [], digits_like(BATCH // 2), "cuda" if torch.cuda.is_available() else "cpu"
    batch = stream[0].batch(slice(None), device=device, layout=torch.channels_last)
    backbones = {
        "MobileNetV2 x0.35": models.torchvision(stream, "mobilenet_v2", width_mult=0.35),
        "MobileNetV2 x1": models.torchvision(stream, "mobilenet_v2"),
        "ResNet-18, width 16": models.resnet18(stream, width=16),
    }
    with threadpool_limits(1):
        for name, backbone in backbones.items():
            backbone = backbone.to(device).to(memory_format=torch.channels_last)
            made = Modulated(backbone, Modulation(4, 4))
            folded = made.folded(made.state(range(10)))
            pairs = {
                f"step of {name}, modulated / plain": [
                    steps(net, batch.x, batch.y, STEPS, ADAMW) for net in (made, backbone)
                ],
                f"inference of {name}, folded / backbone": [
                    inference(net, batch.x) for net in (folded, Modulated(backbone).backbone)
                ],
            }
            for title, (ours, theirs) in pairs.items():
                seconds = interleaved({"ours": ours, "theirs": theirs}, 9)
                table.append(row(title, "seconds", seconds["ours"] / STEPS, seconds["theirs"] / STEPS))
    return table


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

    x = torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = data.Examples(x, torch.arange(200) % 10)
    stream = data.domains([data.Dataset("noise", rows, rows, tuple(map(str, range(10))))])
    nets, batches = [models.resnet18(stream, seed=seed).eval() for seed in (0, 1)], list(x.split(25))
    symmetry = alignment.symmetry(nets[0], x[:2])
    first, second = map(get_weights, nets)
    places = [list(prefixes(net)) for net in nets]

    def by_prefix() -> None:
        for pair in zip(*places, strict=True):
            linear_sum_assignment(correlation(pair[0], pair[1], batches).numpy(), maximize=True)

    ways: dict[str, Way] = {
        "ours": lambda: alignment.align(symmetry, nets[0], first, second, x, batch=25),
        "forward": lambda: [net(batch) for net in nets for batch in batches],
        "prefixes": by_prefix,
    }
    return interleaved(ways, 3)


def alignments() -> list[Row]:
    """Our rate over each other's."""
    seconds = apart(alignment_seconds)
    names = {"prefixes": "a prefix network each", "forward": "the two forward passes alone"}
    return [
        row(f"alignment / {words}", "alignments a second", 1 / seconds["ours"], 1 / seconds[way])
        for way, words in names.items()
    ]

"""Each claim about speed, measured in one run: against the naive way, against a floor, and against peers.

A ratio is theirs over ours: above 1, clkit takes less. Every number is a median over turns. In each turn all ways of a
benchmark go, one after the other: a slow minute slows them all. A benchmark is a process of its own, of one thread on
the CPU, and counts the seconds that this computes. A peer that is not installed is named, without a number.

- training: a step of ER on random bytes, with as many rows from the memory as from the task. These are 64 of 28 x 28
  pixels for the perceptron 784-100-100-10, else 32 of 3 x 32 x 32, channels last. The floor is a loop by hand over the
  same bytes, in the same layout and precision: draw rows, prepare them, forward, backward, SGD, keep rows. Mammoth's
  rule (arXiv 2004.07211, and its released code) is a DataLoader over PIL images, a transform for each replayed row, a
  draw and a write for each kept one, and `loss.item()`. Avalanche (arXiv 2104.00405) is its Replay strategy over
  prepared tensors, without loggers. Both compute in float32 with channels first, as they come.
- busy: a run on five tasks of digits with all threads that torch would take, by the clock on the wall.
- fisher: 512 rows for the perceptron, 128 for the convnet, true labels. BackPACK (arXiv 1912.10985): SumGradSquared.
- merging: five networks of ResNet-18's shapes; of half the width for TIES and DELLA. A sum reads every input once and
  writes the result once. FusionBench (arXiv 2406.03280) trims all weights as one vector, mergekit (arXiv 2403.13257) a
  tensor at a time; each is held against ours with the same option. Both are called below what loads and saves models.
- alignment: ResNet-18 with the stem for small images, of width 32, on 64 images of 32 x 32. CLeWI's released code
  (arXiv 2404.04002) finds each of 13 permutations from activations that it gets by running both networks from the input
  up to there, twice; here once. Every first symmetry is of another width, so that none can know the last one's.
- tangent: cross entropy on 64 random images of 28 x 28, SGD. Where matrix products take the time, an ordinary step is
  three passes (forward, and two backward). A tangent step is five, since a tangent passes through every layer twice:
  its rate can be 0.6 of the ordinary one.
- modulation: forward, backward and AdamW on 32 images of 28 x 28; the plain step trains every weight.
- consolidation: a run of the perceptron over three tasks of random bytes.
"""

import copy
import importlib.metadata
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from clkit import alignment, checks, curvature, data, models
from clkit.consolidation import EMA, SFA
from clkit.experiments.pages import repository
from clkit.learners import ER
from clkit.merging import della, ties
from clkit.modulation import Modulated, Modulation
from clkit.store import write_json, write_text
from clkit.tangent import Linearized
from clkit.training import Training, run
from clkit.weights import Weights, combine, get_weights

Row = dict[str, Any]
Measure = Callable[[], float]
Ways = dict[tuple[str, str], Measure | None]  # by the case and the way it is done; None where a peer is not installed
Tick = Callable[[], None]
OURS = "clkit"
PACKAGES = ("torch", "avalanche-lib", "backpack-for-pytorch", "fusion-bench", "mergekit")


def benchmarks() -> dict[str, Callable[..., list[Row]]]:
    """The benchmarks by name: functions of a number of turns and of the share of the full size to run at."""
    return {
        "training": training, "busy": busy, "fisher": fisher, "merging": merging, "alignment": alignments,
        "tangent": tangent, "modulation": modulation, "consolidation": consolidation,
    }  # fmt: skip


def rows(names: Sequence[str] = (), progress: bool = True) -> Iterator[Row]:
    """Runs benchmarks, by default all, one after another, and yields their rows.

    A row has the `benchmark` and, in words, `what` was measured in which `case` and `against` what, all three also as
    one `name`; then `unit`, `ours`, `theirs` and the `ratio` of theirs to ours. These two are None for a peer that is
    not installed. Raises ValueError on an unknown name before any is run.
    """
    chosen = [checks.choice("benchmark", name, benchmarks()) for name in names] or list(benchmarks())
    for name in tqdm(chosen, disable=not progress, unit="benchmark"):
        yield from ({"benchmark": name, **row} for row in apart(name))


def apart(name: str) -> list[Row]:
    """The rows of one benchmark from a new process of one thread and no GPU; peers may print before them."""
    code = f"import json, sys; from {__name__} import benchmarks as b; print('\\n', json.dumps(b()[sys.argv[1]]()))"
    call, env = [sys.executable, "-W", "ignore", "-c", code, name], {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(call, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def cost(go: Callable[[], object], times: float = 1) -> Measure:
    """Measures the seconds that a call takes, over `times`."""

    def measure() -> float:
        started = time.process_time()
        go()
        return (time.process_time() - started) / times

    return measure


def a_step(loop: Callable[[Tick], object], count: int) -> Measure:
    """Measures the seconds of a step, the mean of the last so many of a loop that calls `tick()` after each."""

    def measure() -> float:
        ticks: list[float] = []
        loop(lambda: ticks.append(time.process_time()))
        return (ticks[-1] - ticks[-1 - count]) / count

    return measure


def compare(what: str, ways: Ways, turns: int, unit: str = "seconds of the CPU") -> list[Row]:
    """The rows for each way but ours against ours in the same case; what stands in several places is taken once."""
    taken: dict[Measure, list[float]] = {measure: [] for measure in ways.values() if measure is not None}
    for _ in range(turns):
        for measure, values in taken.items():
            values.append(measure())
    medians: dict[Any, float] = {measure: statistics.median(values) for measure, values in taken.items()}
    table = []
    for (case, way), measure in ways.items():
        if way != OURS:
            ours, theirs = medians[ways[case, OURS]], medians.get(measure)
            row = {"name": f"{what}, {case} / {way}", "what": what, "case": case, "against": way, "unit": unit}
            table.append(row | {"ours": ours, "theirs": theirs, "ratio": theirs and theirs / ours})
    return table


def peer(name: str) -> Any:
    """A module of another project, None where that is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def noise(count: int, shape: tuple[int, ...], augment: data.Augment = data.NO_AUGMENT, tasks: int = 1) -> data.Stream:
    """Tasks of the same random bytes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, *shape), generator=g, dtype=torch.uint8)
    rows = data.Examples(x, torch.randint(0, 10, (count,), generator=g))
    one = data.Task(0, "bytes", (*range(10),), rows, rows[:10], data.Normalize((0.4,), (0.3,)), augment)
    return data.Stream("bytes", tuple(replace(one, index=i) for i in range(tasks)), (*"0123456789",), "domain")


def steps(net: nn.Module, batch: data.Batch, optimizer: Callable[..., torch.optim.Optimizer]) -> Measure:
    """Measures the seconds of a training step of what wants a gradient in a network, the mean of a few on one batch."""
    net.train()
    stepper = optimizer([p for p in net.parameters() if p.requires_grad])

    def go() -> None:
        for _ in range(4):
            stepper.zero_grad()
            cross_entropy(net(batch.x), batch.y).backward()
            stepper.step()

    return cost(go, 4)


SGD = partial(torch.optim.SGD, lr=0.01)
MEMORY = 500
CASES = {"": ((), "float32"), " augmented": ((4, True), "float32"), " in bfloat16": ((), "bfloat16")}
# a factory, the shape of an input, how many rows a step takes of the task, how many steps are timed
NETS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], int, int]] = {
    "perceptron": (models.mlp, (1, 28, 28), 64, 150),
    "convnet": (models.convnet, (3, 32, 32), 32, 10),
    "ResNet-18": (partial(models.resnet18, width=16), (3, 32, 32), 32, 4),
}


def training(turns: int = 5, share: float = 1.0) -> list[Row]:
    """Our step of ER against a loop by hand, a loop that a DataLoader feeds, and Avalanche."""
    ways: Ways = {}
    for net, (factory, shape, batch, full) in NETS.items():
        timed, batch = max(2, round(full * share)), max(2, round(batch * share))
        count = (timed + 4) * batch
        by_peer = by_avalanche(noise(count, shape), factory, batch)
        others = {"Mammoth's rule": a_step(partial(by_loader, noise(count, shape), factory, batch), timed)}
        others["Avalanche"] = by_peer and a_step(by_peer, timed)  # pyright: ignore
        for words, (moves, precision) in CASES.items():
            if precision == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
                for way, loop in ((OURS, resident), ("a loop by hand", by_hand)):
                    stream = noise(count, shape, data.Augment(*moves))
                    ways[net + words, way] = a_step(partial(loop, stream, factory, batch, precision), timed)
                ways |= {} if moves else {(net + words, way): measure for way, measure in others.items()}
    return compare("ER step", ways, turns)


def resident(stream: data.Stream, factory: Any, batch: int, precision: Any, tick: Tick) -> None:
    """Our loop."""

    class Ticking(ER):
        """ER that tells of every step."""

        def after_step(self, model: nn.Module, batch: data.Batch) -> None:
            super().after_step(model, batch)
            tick()

    recipe = Training(1, batch, 0.01, precision=precision, channels_last=True)
    run(stream, factory, Ticking(MEMORY), None, recipe, device="cpu", progress=False, keep=False)


def by_hand(stream: data.Stream, factory: Any, batch: int, precision: str, tick: Tick) -> None:
    """The least that a loop over resident bytes does."""
    task, g, layout = stream[0], torch.Generator().manual_seed(0), torch.channels_last
    x, y, cast = task.train.x, task.train.y, torch.autocast("cpu", torch.bfloat16, precision == "bfloat16")
    kept_x, kept_y = x[:MEMORY].clone(), y[:MEMORY].clone()
    net = factory(stream).to(memory_format=layout).train()
    parameters = list(net.parameters())
    for new in torch.randperm(len(y), generator=g).split(batch):
        old = torch.randint(len(kept_y), new.shape, generator=g)
        inputs = task.prepare(torch.cat([x[new], kept_x[old]]), g).contiguous(memory_format=layout)
        with cast:
            loss = cross_entropy(net(inputs), torch.cat([y[new], kept_y[old]]))
        slopes = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, slopes, alpha=-0.01)  # pyright: ignore
        kept_x[old], kept_y[old] = x[new], y[new]
        tick()


def by_loader(stream: data.Stream, factory: Any, batch: int, tick: Tick) -> None:
    """The rule as Mammoth has it, fed by a DataLoader, with a memory that is filled row by row."""
    from torchvision import transforms

    task, net, seen = stream[0], factory(stream).train(), 0
    optimizer, to_tensor = SGD(net.parameters()), transforms.ToTensor()
    normalize = transforms.Normalize(task.normalize.mean, task.normalize.std)
    kept_x, kept_y = torch.zeros(MEMORY, *stream.shape), torch.zeros(MEMORY, dtype=torch.int64)
    images = list(zip(map(transforms.ToPILImage(), task.train.x), task.train.y, strict=True))
    for rows in torch.utils.data.DataLoader(images, batch, shuffle=True, collate_fn=list):  # pyright: ignore
        bare, y = torch.stack([to_tensor(image) for image, _ in rows]), torch.stack([label for _, label in rows])
        x = torch.stack([normalize(image) for image in bare])
        old = torch.randperm(min(seen, MEMORY))[:batch]
        inputs = torch.cat([x, *(normalize(row)[None] for row in kept_x[old])])
        optimizer.zero_grad()
        loss = cross_entropy(net(inputs), torch.cat([y, kept_y[old]]))
        loss.backward()
        optimizer.step()
        for image, label in zip(bare, y, strict=True):
            slot = seen if seen < MEMORY else random.randrange(seen + 1)
            if slot < MEMORY:
                kept_x[slot], kept_y[slot] = image, label
            seen += 1
        loss.item()
        tick()


def by_avalanche(stream: data.Stream, factory: Any, batch: int) -> Callable[[Tick], None] | None:
    """Avalanche's strategy, which replays from the second experience on, if it is installed."""
    if (package := peer("avalanche.training")) is None:
        return None
    x, y = stream[0].prepare(stream[0].train.x), stream[0].train.y
    parts = [(x[: 2 * batch], y[: 2 * batch]), (x, y)]
    made = peer("avalanche.benchmarks").tensors_benchmark(train_tensors=parts, test_tensors=parts, task_labels=[0, 0])

    def loop(tick: Tick) -> None:
        net, told = factory(stream), SimpleNamespace(after_training_iteration=lambda *_, **__: tick())
        options = {"criterion": nn.CrossEntropyLoss(), "mem_size": MEMORY, "train_mb_size": batch, "plugins": [told]}
        options["evaluator"] = package.plugins.EvaluationPlugin()
        strategy = package.Replay(model=net, optimizer=SGD(net.parameters()), **options)
        for experience in made.train_stream:
            strategy.train(experience)

    return loop


def busy(turns: int = 5, share: float = 1.0) -> list[Row]:
    """A run with two busy processes beside it against the same run alone."""
    stream, recipe = data.split(data.digits(), tasks=5), Training(max(1, round(4 * share)))
    stream = replace(stream, tasks=stream.tasks[: max(1, round(5 * share))])

    def alone() -> float:
        return run(stream, models.convnet, ER(50), None, recipe, device="cpu", progress=False).seconds

    def beside() -> float:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        try:
            return alone()
        finally:
            for other in others:
                other.kill()
                other.wait()

    with threadpool_limits(os.cpu_count()):
        ways: Ways = {("digits", OURS): beside, ("digits", "the same alone"): alone}
        return compare("run beside two busy processes", ways, turns, "seconds")


def fisher(turns: int = 5, share: float = 1.0) -> list[Row]:
    """The diagonal of the Fisher information against gradients taken one by one, by `vmap`, and BackPACK's."""
    ways: Ways = {}
    for case, full in (("perceptron", 512), ("convnet", 128)):
        factory, shape, *_ = NETS[case]
        stream = noise(max(2, round(full * share)), shape)
        net, x, y = parts = factory(stream).eval(), stream[0].prepare(stream[0].train.x), stream[0].train.y
        ways[case, OURS] = cost(partial(curvature.fisher, net, x, labels="true", y=y))
        ways[case, "a loop over examples"] = cost(partial(squares_by_loop, *parts))
        ways[case, "vmap"] = cost(partial(squares_by_vmap, *parts))
        ways[case, "BackPACK"] = cost(partial(squares_by_backpack, *parts)) if peer("backpack") else None
    return compare("Fisher diagonal", ways, turns)


def squares_by_loop(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The mean over examples of squared gradients, an example at a time."""
    parameters = list(net.parameters())
    squares = [torch.zeros_like(p) for p in parameters]
    for row, label in zip(x.split(1), y.split(1), strict=True):
        slopes = torch.autograd.grad(cross_entropy(net(row), label), parameters)
        squares = [total.addcmul_(slope, slope) for total, slope in zip(squares, slopes, strict=True)]
    return [total / len(x) for total in squares]


def squares_by_vmap(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The same from all gradients at once."""
    loss = lambda p, x, y: cross_entropy(functional_call(net, p, x[None]), y[None])  # noqa: E731
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    return [slope.square().mean(0) for slope in vmap(grad(loss), (None, 0, 0))(parameters, x, y).values()]


def squares_by_backpack(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The same by BackPACK."""
    package, rule = peer("backpack"), peer("backpack.extensions").SumGradSquared()
    net, loss = package.extend(copy.deepcopy(net)), package.extend(nn.CrossEntropyLoss(reduction="sum"))
    with package.backpack(rule):
        loss(net(x), y).backward()
    return [p.sum_grad_squared / len(x) for p in net.parameters()]  # pyright: ignore


DENSITY = 0.2


def merging(turns: int = 5, share: float = 1.0) -> list[Row]:
    """A sum against copies; TIES and DELLA against sorting, FusionBench and mergekit."""
    ways: Ways = {}
    out, base, *ws = networks(64 * share, 7)
    ways["sum into place", OURS] = cost(partial(combine, ws, [0.2] * 5, out=out))
    copied = cost(lambda: [out[name].copy_(t) for name, t in base.items()], 2 / 6)
    ways["sum into place", "copying as many bytes"] = copied
    origin, *tuned = networks(32 * share, 6)
    trimmed = peer("fusion_bench.method.ties_merging.ties_merging_utils")
    ways["TIES", OURS] = cost(partial(ties, tuned, base=origin, density=DENSITY))
    ways["TIES", "plain code"] = cost(partial(as_one_vector, by_sorting, tuned, origin))
    by_theirs = trimmed and partial(trimmed.ties_merging, reset_thresh=100 * DENSITY, merge_func="mean")
    ways["TIES", "FusionBench"] = trimmed and cost(partial(as_one_vector, by_theirs, tuned, origin))
    known = peer("mergekit.merge_methods.registry")
    for name, merge in {"ties": partial(ties, whole=False), "della": partial(della, epsilon=0.1)}.items():
        case = f"{name.upper()} by tensor"
        ways[case, OURS] = cost(partial(merge, tuned, base=origin, density=DENSITY))
        ways[case, "mergekit"] = known and cost(partial(by_mergekit, known.get(name), tuned, origin))
    return compare("merge of 5", ways, turns)


def networks(width: float, count: int) -> list[Weights]:
    """The weights of so many ResNet-18s."""
    nets = (models.resnet18(noise(10, (3, 32, 32)), max(1, round(width)), seed=seed) for seed in range(count))
    return list(map(get_weights, nets))


def as_one_vector(rule: Callable[[Tensor], Tensor], ws: list[Weights], base: Weights) -> dict[str, Tensor]:
    """A merge as it is mostly written: of task vectors (n, entries) that are stacked, added to the base."""
    origin, *others = (torch.cat([t.flatten() for t in w.values()]) for w in (base, *ws))
    parts = (origin + rule(torch.stack(others) - origin)).split([t.numel() for t in base.values()])
    return {name: part.view_as(t) for part, (name, t) in zip(parts, base.items(), strict=True)}


def by_sorting(vectors: Tensor) -> Tensor:
    """TIES with a threshold from sorted magnitudes."""
    keep = int(DENSITY * vectors.shape[1])
    vectors = vectors * (vectors.abs() >= vectors.abs().sort(1, descending=True).values[:, keep - 1 : keep])
    agree = vectors.sign() == vectors.sum(0).sign()
    return (vectors * agree).sum(0) / (agree & (vectors != 0)).sum(0).clamp(min=1)


def by_mergekit(method: Any, ws: list[Weights], base: Weights) -> dict[str, Tensor]:
    """A merge of task vectors by mergekit, tensor by tensor."""
    options = {"weight": [1.0] * len(ws), "density": [DENSITY] * len(ws), "epsilon": [0.05] * len(ws), "lambda": 1.0}
    options |= {"normalize": True, "rescale": False, "int8_mask": False}

    merged = {}
    for name, tensor in base.items():
        flat = [w[name].flatten(1) if tensor.ndim > 1 else w[name] for w in (base, *ws)]
        origin, *others = (SimpleNamespace(id=i, tensor=t) for i, t in enumerate(flat, -1))
        merged[name] = method.merge_group(SimpleNamespace(base=origin, non_base=others), **options).view_as(tensor)
    return merged


@torch.no_grad()
def alignments(turns: int = 5, share: float = 1.0) -> list[Row]:
    """An alignment against the passes that it needs, and against prefix networks; a symmetry against an alignment."""
    from scipy.optimize import linear_sum_assignment

    stream, width = noise(max(10, round(64 * share)), (3, 32, 32)), max(1, round(32 * share))
    x = stream[0].prepare(stream[0].train.x)
    nets = [models.resnet18(stream, width, seed=seed).eval() for seed in (0, 1)]
    fresh = (models.resnet18(stream, width + turn).eval() for turn in range(1, turns + 1))
    symmetry, (first, second) = alignment.symmetry(nets[0], x[:2]), map(get_weights, nets)

    def by_prefix() -> None:
        for pair in zip(*map(prefixes, nets), strict=True):
            a, b = (net(x).movedim(1, 0).flatten(1) for net in pair)
            linear_sum_assignment(torch.corrcoef(torch.cat([a, b]))[: len(a), len(a) :].nan_to_num(), maximize=True)

    ours = cost(lambda: alignment.align(symmetry, nets[0], first, second, x, batch=32))
    ways: Ways = {("ResNet-18", OURS): ours, ("ResNet-18", "prefix networks"): cost(by_prefix)}
    ways["ResNet-18", "two forward passes"] = cost(lambda: [net(part) for net in nets for part in x.split(32)])
    ways["first symmetry", OURS] = cost(lambda: alignment.symmetry(next(fresh), x[:2]))
    ways["second symmetry", OURS] = cost(lambda: alignment.symmetry(nets[0], x[:2]))
    ways |= {(case, "the alignment itself"): ours for case in ("first symmetry", "second symmetry")}
    return compare("alignment", ways, turns)


def prefixes(net: nn.Module) -> Iterator[nn.Module]:
    """The networks up to each place of the 13 permutations: stem, inside of every block, end of every stage."""
    layers = [m for part in net.children() for m in (part if isinstance(part, nn.Sequential) else [part])]
    yield nn.Sequential(*layers[:3])
    for k, block in enumerate(layers):
        if isinstance(block, models.BasicBlock):
            yield nn.Sequential(*layers[:k], block.conv1, block.norm1, nn.ReLU())
            if k % 2 == 0:  # the stem is three layers, a stage two
                yield nn.Sequential(*layers[: k + 1])


class ByJvp(Linearized):
    """The definition as most code has it: forward mode through the network, and a graph of all of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Prepared inputs to logits."""
        theta, point = dict(self.named_parameters()), dict(self.network.named_parameters())
        steps = {name: theta[name] - p for name, p in point.items()}
        pair = jvp(lambda p: functional_call(self.network, p, (x,)), (point,), (steps,))
        return pair[0] + pair[1]


def tangent(turns: int = 5, share: float = 1.0) -> list[Row]:
    """A tangent step against an ordinary one and against the definition."""
    stream = noise(max(2, round(64 * share)), (1, 28, 28))
    batch, ways = stream[0].batch(slice(None)), {}
    for case, (factory, *_) in NETS.items():
        net = factory(stream)
        for way, made in ((OURS, Linearized(net)), ("an ordinary step", net), ("torch.func.jvp", ByJvp(net))):
            ways[case, way] = steps(made, batch, SGD)
    return compare("tangent step", ways, turns)


def modulation(turns: int = 5, share: float = 1.0) -> list[Row]:
    """A step that modulates a frozen network's weights against one that trains all of them."""
    stream = noise(max(2, round(32 * share)), (1, 28, 28))
    batch, net = stream[0].batch(slice(None)), models.torchvision(stream, "mobilenet_v2")
    ways: Ways = {("MobileNetV2", OURS): steps(Modulated(net, Modulation(4, 4)), batch, torch.optim.AdamW)}
    ways["MobileNetV2", "a plain step"] = steps(net, batch, torch.optim.AdamW)
    return compare("modulated step", ways, turns)


def consolidation(turns: int = 5, share: float = 1.0) -> list[Row]:
    """A run with each consolidation against one without."""
    stream, recipe = noise(max(64, round(6000 * share)), (1, 28, 28), tasks=3), Training(1, 64, 0.01)
    learn = partial(run, stream, models.mlp, training=recipe, device="cpu", progress=False, keep=False)
    ways: Ways = dict.fromkeys([("EMA()", "one without"), ("SFA(p=0.02)", "one without")], cost(learn))
    ways["EMA()", OURS] = cost(partial(learn, consolidation=EMA()))
    ways["SFA(p=0.02)", OURS] = cost(partial(learn, consolidation=SFA(p=0.02)))
    return compare("run with", ways, turns)


BEGIN, END = "<!-- speed -->\n", "<!-- end of speed -->\n"


def record(found: Iterable[Row], root: Path | None = None) -> list[Row]:
    """Writes rows to figures/bench.json, in the place of older ones of their benchmarks, and to clkit/README.md.

    Machine, versions and date go with them. Both files are those of the repository, by default the one around. Gives
    the rows. Raises ValueError before the first is taken if the README has no place for the table.
    """
    path, readme = (root or repository()) / "figures" / "bench.json", (root or repository()) / "clkit" / "README.md"
    before, mark, rest = (readme.read_text(encoding="utf-8") if readme.exists() else "").partition(BEGIN)
    if not mark:
        raise ValueError(f"write: {readme} has no line {BEGIN.strip()}; write from within clkit's repository")
    taken = list(found)
    whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, some in itertools.groupby(taken, lambda row: row["benchmark"]):
        whole[name] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": {}, "rows": list(some)}
        whole[name]["versions"] = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}
    write_json(path, whole)
    write_text(readme, before + BEGIN + table(whole) + END + rest.partition(END)[2])
    return taken


def machine() -> str:
    """The processor's model and how many cores it has here."""
    cpu = Path("/proc/cpuinfo")
    model = cpu.read_text().partition("model name\t: ")[2].partition("\n")[0] if cpu.exists() else os.uname().machine
    return f"{model}, {os.cpu_count()} cores, 1 thread"


def table(whole: Mapping[str, Row]) -> str:
    """What was recorded as a table in Markdown: a line for each thing that is measured and what it is held against."""
    lines, runs = {}, {}
    for name in (name for name in benchmarks() if name in whole):
        versions = ", ".join(f"{package} {version}" for package, version in sorted(whole[name]["versions"].items()))
        runs[f"{whole[name]['machine']}; {versions}; {whole[name]['date']}"] = None
        for row in whole[name]["rows"]:
            ratio = f"{row['ratio']:.2f}" if row["ratio"] else "not installed"
            lines.setdefault((row["what"], row["against"]), []).append(f"{row['case']} {ratio}")
    body = [f"| {what} | {other} | {', '.join(cells)} |" for (what, other), cells in lines.items()]
    return "\n".join(["| | against | times as fast |", "|---|---|---|", *body, "", f"On {'. '.join(runs)}.", ""])

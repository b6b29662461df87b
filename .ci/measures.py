#!/usr/bin/env python3
"""What a GPU is for, as ratios: each part's rows (name, unit, ours, theirs, ratio) are in FILE as soon as it is done.

    .ci/measures.py FILE [PART...]

- training: images a second of experience replay on ResNet-18 at 32 + 32 and 128 + 128 rows, augmented, captured and as
  it is, against forward and backward passes alone over one batch in place, captured and as they are
- merges: gigabytes a second that merges read and write, against copying into place
- alignment: two networks of ResNet-18 aligned by 1,000 images, against the two forward passes alone
- tangent: steps a second in the tangent space of ResNet-18, against ordinary ones
- sharing: runs a minute of a sweep that has the card to itself, as many at once as fit, against one after another

What FILE has, of the same code, device and torch, is not measured again. Without a GPU the same path runs on small
networks and a few images.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clkit import alignment, data, models
from clkit.experiments import sweep
from clkit.learners import ER
from clkit.merging import dare_ties, ties
from clkit.store import source_digest
from clkit.tangent import Linearized
from clkit.training import Training, run
from clkit.weights import combine, get_weights, lerp

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
WARM, STEPS = (50, 300) if GPU else (6, 4)  # steps before the clock starts, and on it
RESNET = models.resnet18 if GPU else partial(models.resnet18, width=4)
SIDE = 32 if GPU else 8


def finish() -> None:
    """Waits until the GPU is done."""
    if GPU:
        torch.cuda.synchronize()


def finished(work: Callable[[], Any]) -> Callable[[], None]:
    """Work whose end is waited for."""

    def go() -> None:
        work()
        finish()

    return go


def interleaved(ways: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, float]:
    """The median seconds that each way takes, of `repeats`, taking turns; a first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def row(name: str, unit: str, ours: float, theirs: float) -> dict:
    """Two numbers of one unit, and ours over theirs."""
    return {"name": name, "unit": unit, "ours": ours, "theirs": theirs, "ratio": ours / theirs}


def noise(rows: int, tests: int = 20, **more: Any) -> data.Stream:
    """One task of random images in CIFAR-10's format."""
    g = torch.Generator().manual_seed(0)

    def examples(count: int) -> data.Examples:
        images = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=g, dtype=torch.uint8)
        return data.Examples(images, torch.arange(count) % 10)

    task = data.Task(0, "noise", tuple(range(10)), examples(rows), examples(tests), data.Normalize((0.5,), (0.25,)))
    return data.Stream("noise", (replace(task, **more),), tuple("abcdefghij"))


class Timed(ER):
    """Experience replay that looks at the clock after WARM steps and after STEPS more."""

    def start(self, setting: Any) -> None:
        """Begins with an empty memory and no step."""
        super().start(setting)
        self.steps, self.times = 0, list[float]()

    def after_step(self, model: nn.Module, batch: Any) -> None:
        """Offers the current rows to the memory, and looks at the clock."""
        super().after_step(model, batch)
        self.steps += 1
        if self.steps in (WARM, WARM + STEPS):
            finish()
            self.times.append(time.perf_counter())


def replay(half: int, capture: bool) -> float:
    """Images a second of experience replay, `half` of each batch from the memory."""
    stream = noise(half * (WARM + STEPS), augment=data.Augment(crop=4, flip=True))
    recipe = Training(epochs=1, batch=half, lr=0.01, capture=capture)
    learner = run(stream, RESNET, Timed(500), None, recipe, device=DEVICE, progress=False, keep=False).learner
    assert isinstance(learner, Timed)
    return 2 * half * STEPS / (learner.times[1] - learner.times[0])


def passes(rows: int, capture: bool) -> float:
    """Images a second of forward and backward passes of the network over one batch."""
    stream = noise(rows)
    net = RESNET(stream).to(DEVICE).to(memory_format=torch.channels_last).train()
    batch = stream[0].batch(slice(None), device=DEVICE, layout=torch.channels_last)

    def step() -> None:
        net.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False) if GPU else nullcontext():
            loss = cross_entropy(net(batch.x), batch.y)
        loss.backward()

    def timed(go: Callable[[], Any]) -> float:
        seconds = interleaved({"step": finished(lambda: [go() for _ in range(STEPS)])}, 3)["step"]
        return rows * STEPS / seconds

    if not GPU:
        return timed(step)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            step()
        if not capture:
            return timed(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            step()
        return timed(graph.replay)


def training() -> list[dict]:
    """Captured and not, against the passes alone and against each other."""
    table = []
    for half in (32, 128) if GPU else (4, 8):
        words = {True: "captured", False: "as it is"}
        ours, bare = (
            {how: measure(rows, how) for how in words} for measure, rows in ((replay, half), (passes, 2 * half))
        )
        unit, name = "images a second", f"ER on ResNet-18 at {half} + {half}"
        table += [row(f"{name}, {words[how]} / bare passes, {words[how]}", unit, ours[how], bare[how]) for how in words]
        table.append(row(f"{name}, captured / as it is", unit, ours[True], ours[False]))
    steps = 5 * 50 * (10_000 // 32 + 1)
    seconds = steps * 64 / table[0]["ours"]
    return [*table, row("steps of one seed of CLeWI's CIFAR-10 stream / goal", "minutes", seconds / 60, 3.0)]


def merges() -> list[dict]:
    """Each merge against copying, in bytes that are read once and written once."""
    shapes = {name: tensor.shape for name, tensor in get_weights(RESNET(noise(2))).items()}
    g = torch.Generator(DEVICE).manual_seed(0)
    copies = range(8 if GPU else 1)  # so that no network fits in a cache

    def made() -> dict[str, Tensor]:
        return {f"{k}.{n}": torch.randn(s, generator=g, device=DEVICE) for k in copies for n, s in shapes.items()}

    base, out, *ws = (made() for _ in range(7))
    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "copy": (2, lambda: [out[name].copy_(tensor) for name, tensor in base.items()]),
        "lerp into place": (3, lambda: lerp(ws[0], ws[1], 0.3, out=out)),
        "average of 5 into place": (6, lambda: combine(ws, [0.2] * 5, out=out)),
        "task arithmetic of 5 into place": (7, lambda: combine([base, *ws], [-0.5, *[0.3] * 5], out=out)),
        "TIES of 5": (7, lambda: ties(ws, base=base)),
        "DARE with TIES of 5": (7, lambda: dare_ties(ws, base=base)),
    }
    size = sum(tensor.nbytes for tensor in base.values()) / 1e9
    seconds = interleaved({name: finished(way) for name, (_, way) in ways.items()})
    rates = {name: networks * size / seconds[name] for name, (networks, _) in ways.items()}
    return [row(f"{name} / copy", "GB a second", rate, rates["copy"]) for name, rate in rates.items() if name != "copy"]


@torch.no_grad()
def aligned() -> list[dict]:
    """Alignments a second against twice the forward passes."""
    stream = noise(1000 if GPU else 40)
    nets = [RESNET(stream, seed=seed).to(DEVICE).eval() for seed in (0, 1)]
    x = stream[0].batch(slice(None), device=DEVICE).x
    symmetry, (first, second) = alignment.symmetry(nets[0], x[:2]), map(get_weights, nets)
    batch = 250 if GPU else 20
    ways = {
        "ours": finished(lambda: alignment.align(symmetry, nets[0], first, second, x, batch=batch)),
        "passes": finished(lambda: [net(part) for net in nets for part in x.split(batch)]),
    }
    seconds = interleaved(ways)
    name = "alignment / the two forward passes alone"
    return [row(name, "alignments a second", 1 / seconds["ours"], 1 / seconds["passes"])]


def tangent() -> list[dict]:
    """Tangent steps against ordinary ones, forward, backward and SGD, nothing captured."""
    stream, ways = noise(64 if GPU else 8), {}
    batch = stream[0].batch(slice(None), device=DEVICE)
    net = RESNET(stream).to(DEVICE).train()

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(10 if GPU else 2):
            optimizer.zero_grad()
            cross_entropy(model(batch.x), batch.y).backward()
            optimizer.step()

    for name, model in (("ours", Linearized(net)), ("ordinary", net)):
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ways[name] = finished(partial(steps, model, torch.optim.SGD(wanted, lr=1e-3)))
    seconds = interleaved(ways)
    name = "tangent step of ResNet-18 / an ordinary step"
    return [row(name, "steps a second", 1 / seconds["ours"], 1 / seconds["ordinary"])]


def sharing() -> list[dict]:
    """A sweep of eight seeds, as many at once as fit, against one after another; processes begin within it."""
    tasks = data.split(data.digits(), 2)
    recipe, seconds = Training(epochs=100 if GPU else 1, batch=32, lr=0.05), {}
    for name, jobs in (("fit", None), ("one", 1)):
        with tempfile.TemporaryDirectory() as store:
            begun, more = time.perf_counter(), {"jobs": jobs if GPU else 1, "device": DEVICE, "progress": False}
            seeds = range(8 if GPU else 2)
            sweep(tasks, models.convnet, {"ER": ER(100)}, training=recipe, seeds=seeds, store=store, **more)
            seconds[name] = (time.perf_counter() - begun) / len(seeds)
    fit, one = (60 / seconds[name] for name in ("fit", "one"))
    return [row("a sweep, as many runs as fit / one after another", "runs a minute", fit, one)]


PARTS = {"training": training, "merges": merges, "alignment": aligned, "tangent": tangent, "sharing": sharing}


def main() -> int:
    """Measures the parts that the file does not have; 1 if one fails."""
    parser = argparse.ArgumentParser(description="What a GPU is for, as ratios.")
    parser.add_argument("file", type=Path, help="where rows are, and go")
    parser.add_argument("parts", nargs="*", help=f"default: all of {', '.join(PARTS)}")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    facts = {"device": torch.cuda.get_device_name() if GPU else "cpu", "torch": torch.__version__}
    facts["code"] = source_digest()
    found = json.loads(chosen.file.read_text()) if chosen.file.is_file() else {}
    found = found if {name: found.get(name) for name in facts} == facts else facts | {"parts": {}}
    failed = False
    for name in chosen.parts or PARTS:
        if name in found["parts"]:
            continue
        begun = time.perf_counter()
        try:
            found["parts"][name] = PARTS[name]()
        except Exception:
            failed = True
            traceback.print_exc()
        chosen.file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - begun:.1f} seconds", flush=True)
    for line in (line for part in found["parts"].values() for line in part):
        print(f"{line['ratio']:8.2f}  {line['name']}: {line['ours']:.4g} and {line['theirs']:.4g} {line['unit']}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

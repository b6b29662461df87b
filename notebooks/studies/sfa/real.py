"""SFA on real data: twenty tasks of CIFAR-100 on ImageNet's EfficientNet-Lite0."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from clkit import data, models
from clkit.consolidation import SFA, Merging
from clkit.data import Examples, Normalize, Stream
from clkit.experiments import Comparison, grid
from clkit.learners import L2, DataBuffer, Learner, OnlineEWC
from clkit.training import Training
from studies.named import dataset
from studies.sfa.images import course

SIZE, STILL = 64, 15  # pixels a side; of the backbone's sixteen blocks those that stay as they are
TRAIN, TEST = 32, 6  # images a class
KNOBS: dict[str, tuple[float, ...]] = {
    "WiSE-FT": (0.3, 0.5, 0.7),
    "L2": (0.001, 0.01, 0.1),
    "EWC": (100.0, 1e3, 1e4, 1e5),
    "task arithmetic": (0.1, 0.3, 0.5),
    "TIES": (0.5, 1.0, 1.5),
}
TUNED = {"WiSE-FT": 0.5, "L2": 0.01, "EWC": 1e3, "task arithmetic": 0.3, "TIES": 1.0}  # by the table "tuning"


def real(part: str = "main") -> Comparison:
    """Twenty tasks of five classes of CIFAR-100, the task given, on a pretrained backbone's last block.

    The seed orders the classes, draws the images and the head. BatchNorm stays as ImageNet left it, rows of the head
    that no task has used are left out of averages. `part`: "main", all methods as tuned, five seeds; "tuning", what
    they were chosen from: another seed, its first ten tasks, tested on training images that it holds out.
    """
    tuning, own = part == "tuning", partial(SFA, untouched="keep")
    apart = partial(Merging, training="independent")
    knobs = KNOBS if tuning else {name: (value,) for name, value in TUNED.items()}
    methods = grid(own, "WiSE-FT β={beta:g}", p=1.0, beta=knobs["WiSE-FT"])
    methods |= grid(L2, "L2 λ={strength:g}", strength=knobs["L2"])
    methods |= grid(OnlineEWC, "EWC λ={strength:g}", strength=knobs["EWC"], samples=32)
    for name, merge in {"task arithmetic": "task_arithmetic", "TIES": "ties"}.items():
        scales = {f"{scale:g}": {"scale": scale} for scale in knobs[name]}
        methods |= grid(apart, name + " {options}", merge=merge, options=scales)
    if not tuning:
        methods |= grid(Learner) | grid(own, "SFA p={p:g}", p=(0.25, 0.5, 0.75, 0.96, 1.0), beta=0.5)
        methods |= grid(DataBuffer, "buffer {share:.0%}", share=(0.05, 0.1))
    adam = Training(2, 20, 0.0005, optimizer="adamw", labels="task", augment=False)
    streams = {f"cifar100, 20 tasks, {TRAIN} images a class": partial(stream, held_out=tuning)}
    seeds = (100,) if tuning else range(5)
    return Comparison(streams, {"efficientnet_lite0, last block": upper}, methods, adam, seeds, course)


def stream(seed: int, held_out: bool = False) -> Stream:
    """Twenty tasks of CIFAR-100 in the seed's order, of its images what the still part of the backbone makes of them.

    Of each class the seed draws 32 training images and 6 to test on. With `held_out` these are training images, too,
    and the tasks are the first ten.
    """
    known, generator = dataset("cifar100"), torch.Generator().manual_seed(seed)
    drawn = _drawn(known.train, TRAIN + TEST, generator)
    test = drawn[:, TRAIN:] if held_out else _drawn(known.test, TEST, generator)
    task = data.split(known, 1)[0]
    lower, parts = _halves(0)[0].eval(), []
    for rows, source in ((drawn[:, :TRAIN], known.train), (test, known.train if held_out else known.test)):
        chosen = source[rows.flatten()]
        with torch.no_grad():
            parts.append(Examples(torch.cat([lower(task.prepare(x)) for x in chosen.x.split(200)]), chosen.y))
    channels = parts[0].x.shape[1]
    seen = replace(known, train=parts[0], test=parts[1], normalize=Normalize((0.0,) * channels, (1.0,) * channels))
    tasks = data.split(seen, 20, order=seed, scenario="task")
    return replace(tasks, tasks=tasks.tasks[:10]) if held_out else tasks


def _drawn(examples: Examples, count: int, generator: torch.Generator) -> torch.Tensor:
    """The rows (C, count) of so many examples of each class."""
    rows = torch.randperm(len(examples), generator=generator)
    return torch.stack([rows[examples.y[rows] == label][:count] for label in range(100)])


def upper(stream: Stream, *, seed: int = 0) -> nn.Module:
    """The backbone's last block, the layers behind it and a fresh head; BatchNorm is frozen."""
    net = _halves(seed)[1]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return net.eval()


def _halves(seed: int) -> tuple[nn.Module, nn.Module]:
    """What stays as it is and what is trained of the backbone with a head drawn by the seed."""
    net: Any = models.efficientnet_lite0(data.split(dataset("cifar100"), 1), size=SIZE, seed=seed)
    body, pool = net.encoder.net, (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    first = (net.encoder.input, body._conv_stem, body._bn0, body._swish, *body._blocks[:STILL])
    return nn.Sequential(*first), nn.Sequential(
        *body._blocks[STILL:], body._conv_head, body._bn1, body._swish, *pool, net.head
    )

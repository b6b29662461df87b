"""Filling a memory: one vectorised write a batch against one row at a time, and against the step that it follows."""

import random

import torch
from torch import nn

from clkit.benchmarks import Row, interleaved, row
from clkit.memory import Memory

ROWS, BATCH, CAPACITY, REPEATS = 4096, 64, 500, 7


def bench() -> list[Row]:
    """Rows a second offered to a reservoir of bytes in the format of MNIST; then a write as a share of a step."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (ROWS, 1, 28, 28), generator=g, dtype=torch.uint8)
    y = torch.randint(0, 10, (ROWS,), generator=g)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def vectorised() -> None:
        memory = Memory(CAPACITY)
        for start in range(0, ROWS, BATCH):
            memory.offer(g, x=x[start : start + BATCH], y=y[start : start + BATCH])

    def one_by_one() -> None:
        xs, ys = torch.zeros((CAPACITY, *x.shape[1:]), dtype=x.dtype), torch.zeros(CAPACITY, dtype=y.dtype)
        for seen in range(ROWS):
            slot = seen if seen < CAPACITY else random.randrange(seen + 1)
            if slot < CAPACITY:
                xs[slot], ys[slot] = x[seen], y[seen]

    def steps() -> None:
        for start in range(0, ROWS, BATCH):
            inputs = torch.cat([x[start : start + BATCH]] * 2) / 255.0
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), torch.cat([y[start : start + BATCH]] * 2)).backward()
            optimizer.step()

    seconds = interleaved({"ours": vectorised, "theirs": one_by_one, "steps": steps}, REPEATS)
    ours, theirs, step = (ROWS / s for s in seconds.values())
    return [
        row("memory write, a batch / a row at a time", "rows a second", ours, theirs),
        row("memory write / the perceptron's training step", "rows a second", ours, step),
    ]
